"""Attention inside a block against the formula."""

import pytest
import torch

from kernels.dispatch import Kernels
from tests.kernels.reference import DTYPES, assert_exact_as_torch, attention, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), [(1, 16), (3, 32), (2, 64), (5, 128)])
@pytest.mark.parametrize(("rows", "length", "first"), [(1, 1, 0), (1, 1, 4), (4, 2, 0), (3, 3, 2), (2, 5, 0)])
def test_causal(
    kernels: Kernels, dtype: torch.dtype, heads: int, head_size: int, rows: int, length: int, first: int
) -> None:
    query = random(rows, length, heads, head_size, dtype=dtype)
    keys, values = (random(rows + 2, heads, 5, head_size, dtype=dtype, seed=seed) for seed in (1, 2))
    keys[rows:], values[rows:] = torch.nan, torch.nan
    keys[:, :, first + length :], values[:, :, first + length :] = torch.nan, torch.nan
    scale = head_size**-0.5
    attended = kernels.local_attention(query, keys, values, first, scale)
    positions = list(range(first, first + length))
    for row in range(rows):
        inputs = query[row], keys[row].transpose(0, 1), values[row].transpose(0, 1)
        assert_exact_as_torch(attended[row], attention, *inputs, positions, scale)
