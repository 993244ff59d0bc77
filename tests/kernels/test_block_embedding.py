"""Block embedding: a table lookup, side by side."""

import pytest
import torch

from kernels.dispatch import Kernels
from tests.kernels.reference import DTYPES, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 4, 16), (2, 7, 1), (0, 4, 8), (1, 3, 2500)])
def test_concatenates_in_order(
    kernels: Kernels, dtype: torch.dtype, ids_dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    blocks, length, width = shape
    table = random(11, width, dtype=dtype)
    ids = torch.randint(11, (blocks, length), generator=torch.Generator().manual_seed(1)).to(ids_dtype)
    embedded = kernels.block_embedding(ids, table)
    assert embedded.shape == (blocks, length * width)
    assert embedded.dtype == dtype
    for block in range(blocks):
        for place in range(length):
            assert torch.equal(embedded[block, place * width : (place + 1) * width], table[int(ids[block, place])])
