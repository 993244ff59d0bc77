"""Rotary embedding against complex rotation, and where keys and values are stored."""

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.rotary import rotary_scratch_write, rotary_table
from tests.kernels.reference import DTYPES, apart, assert_exact_as_torch, int32, is_whole_around, random

BASE = 10000.0
SHAPES = [(1, 16, 4), (3, 32, 8), (2, 64, 64), (5, 128, 32), (4, 16, 2)]
"""Heads, head size, rotated dimensions."""


def rotated(x: Tensor, positions: list[int], dims: int) -> Tensor:
    """Turn each pair (i, i + dims / 2) of x [N, heads, D], as a complex number, by position * base^(-2i / dims)."""
    result = x.clone()
    half = dims // 2
    for entry, position in enumerate(positions):
        for pair in range(half):
            angle = torch.tensor(position * BASE ** (-2 * pair / dims), dtype=torch.float64)
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            first, second = x[entry, :, pair], x[entry, :, pair + half]
            result[entry, :, pair] = first * cos - second * sin
            result[entry, :, pair + half] = second * cos + first * sin
    return result


def test_table() -> None:
    table = rotary_table(50, 8, BASE, torch.device("cpu"))
    assert table.shape == (50, 8)
    assert table.dtype == torch.float32
    angle = 37 * BASE ** (-2 * 3 / 8)
    assert table[37, 3] == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
    assert table[37, 7] == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size", "dims"), SHAPES)
@pytest.mark.parametrize("page_size", [8, 16])
def test_paged_write(
    kernels: Kernels, dtype: torch.dtype, heads: int, head_size: int, dims: int, page_size: int
) -> None:
    positions, slots = [0, 1, 13, 39, 7], [page_size, 2 * page_size - 1, 0, 5 * page_size + 3, 3 * page_size + 7]
    qkv = apart(random(5, heads * 3 * head_size, dtype=dtype))
    parts = qkv.clone().view(5, heads, 3, head_size)
    caches = [torch.full((6, heads, page_size, head_size), 9.0, dtype=dtype) for _ in range(2)]
    table = rotary_table(40, dims, BASE, torch.device("cpu"))
    query = kernels.rotary_paged_write(qkv, int32(positions), torch.tensor(slots), table, caches[0], caches[1])
    assert_exact_as_torch(query, rotated, parts[:, :, 0], positions, dims)
    assert is_whole_around(qkv)
    pages, offsets = [slot // page_size for slot in slots], [slot % page_size for slot in slots]
    assert_exact_as_torch(caches[0][pages, :, offsets], rotated, parts[:, :, 1], positions, dims)
    assert torch.equal(caches[1][pages, :, offsets], parts[:, :, 2])
    for cache in caches:
        cache[pages, :, offsets] = 9.0
        assert (cache == 9.0).all(), "other slots are not to be touched"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size", "dims"), SHAPES)
@pytest.mark.parametrize(("rows", "length", "first"), [(1, 1, 0), (2, 3, 0), (3, 2, 4), (2, 1, 5)])
def test_scratch_write(
    dtype: torch.dtype, heads: int, head_size: int, dims: int, rows: int, length: int, first: int
) -> None:
    qkv = random(rows, length, heads * 3 * head_size, dtype=dtype)
    parts = qkv.clone().view(rows * length, heads, 3, head_size)
    positions = [first + place for _ in range(rows) for place in range(length)]
    scratch = [torch.full((rows + 1, heads, 6, head_size), 9.0, dtype=dtype) for _ in range(2)]
    table = rotary_table(6, dims, BASE, torch.device("cpu"))
    query = rotary_scratch_write(qkv, first, table, scratch[0], scratch[1])
    assert query.shape == (rows, length, heads, head_size)
    assert_exact_as_torch(query.flatten(0, 1), rotated, parts[:, :, 0], positions, dims)
    written = [cache[:rows, :, first : first + length].transpose(1, 2).flatten(0, 1) for cache in scratch]
    assert_exact_as_torch(written[0], rotated, parts[:, :, 1], positions, dims)
    assert torch.equal(written[1], parts[:, :, 2])
    for cache in scratch:
        cache[:rows, :, first : first + length] = 9.0
        assert (cache == 9.0).all(), "other places are not to be touched"
