"""Attention inside a block against the formula, and what it stores."""

import pytest
import torch

from kernels.dispatch import Kernels
from kernels.rotary import rotary_table
from tests.kernels.reference import DTYPES, apart, assert_exact_as_torch, attention, is_whole_around, random
from tests.kernels.test_rotary import BASE, SHAPES, rotated


def attention_of_rotated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: list[int],
    dims: int,
    scale: float,
) -> torch.Tensor:
    """Attention of new positions [S, heads, D] to themselves and to older ones [T, heads, D]."""
    seen_keys = torch.cat((keys, rotated(key, positions, dims)))
    return attention(rotated(query, positions, dims), seen_keys, torch.cat((values, value)), positions, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size", "dims"), SHAPES)
@pytest.mark.parametrize(
    ("rows", "length", "first"), [(1, 1, 0), (1, 1, 4), (1, 2, 0), (4, 2, 0), (3, 3, 2), (2, 5, 0)]
)
def test_causal(
    kernels: Kernels, dtype: torch.dtype, heads: int, head_size: int, dims: int, rows: int, length: int, first: int
) -> None:
    qkv = apart(random(rows * length, heads * 3 * head_size, dtype=dtype))
    parts = qkv.clone().view(rows, length, heads, 3, head_size)
    scratch = [torch.full((rows + 2, heads, 6, head_size), torch.nan, dtype=dtype) for _ in range(2)]
    for seed, cache in enumerate(scratch):
        cache[:rows, :, :first] = random(rows, heads, first, head_size, dtype=dtype, seed=seed + 1)
    before = [cache.clone() for cache in scratch]
    table = rotary_table(6, dims, BASE, torch.device("cpu"))
    scale = head_size**-0.5
    out = apart(torch.empty(rows * length, heads * head_size, dtype=dtype))
    attended = out.view(rows, length, heads, head_size)
    kernels.rotary_local_attention(qkv.view(rows, length, -1), first, table, scratch[0], scratch[1], scale, attended)
    assert is_whole_around(out)
    assert is_whole_around(qkv)
    positions = list(range(first, first + length))
    for row in range(rows):
        older = [cache[row, :, :first].transpose(0, 1) for cache in before]
        assert_exact_as_torch(
            attended[row], attention_of_rotated, *parts[row].unbind(2), *older, positions, dims, scale
        )
    written = [cache[:rows, :, first : first + length].transpose(1, 2).flatten(0, 1) for cache in scratch]
    assert_exact_as_torch(written[0], rotated, parts[:, :, :, 1].flatten(0, 1), positions * rows, dims)
    assert torch.equal(written[1], parts[:, :, :, 2].flatten(0, 1))
    for cache, old in zip(scratch, before, strict=True):
        cache[:rows, :, first : first + length] = torch.nan
        assert torch.equal(cache.nan_to_num(9.0), old.nan_to_num(9.0)), "other places are not to be touched"
