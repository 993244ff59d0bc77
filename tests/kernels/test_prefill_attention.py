"""Ragged paged prefill attention against the formula."""

import pytest
import torch

from kernels.dispatch import Kernels
from tests.kernels.pages import fill_pages
from tests.kernels.reference import DTYPES, apart, assert_exact_as_torch, attention, int32, is_whole_around, random

CHUNKS = (
    [(0, 0, 1)],
    [(0, 0, 20), (1, 3, 1), (2, 8, 17)],
    [(2, 0, 7), (0, 19, 1), (1, 0, 4)],
    [(1, 1, 3), (2, 20, 140), (0, 2, 18)],
    [(2, 5, 155)],
    [(0, 0, 0), (1, 1, 3), (2, 3, 0), (2, 40, 40), (0, 0, 0), (0, 0, 0)],
)
"""(sequence, first position, length); the sequences' lengths are 20, 4 and 160."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: f"{len(chunks)}x{chunks[-1]}")
@pytest.mark.parametrize(("heads", "head_size", "page_size"), [(1, 16, 8), (3, 32, 16), (2, 128, 32)])
def test_ragged_chunks(
    kernels: Kernels,
    dtype: torch.dtype,
    chunks: list[tuple[int, int, int]],
    heads: int,
    head_size: int,
    page_size: int,
) -> None:
    check(kernels, dtype, chunks, heads, head_size, page_size)


@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: f"{len(chunks)}x{chunks[-1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_no_chunk(kernels: Kernels, dtype: torch.dtype, chunks: list[tuple[int, int, int]]) -> None:
    for padding in (1, 140):
        check(kernels, dtype, chunks, 1, 16, 8, padding)


def test_many_chunks(kernels: Kernels) -> None:
    check(kernels, torch.float32, [(0, 0, 1)] * 130 + [(2, 90, 70)], 1, 16, 8)


def check(
    kernels: Kernels,
    dtype: torch.dtype,
    chunks: list[tuple[int, int, int]],
    heads: int,
    head_size: int,
    page_size: int,
    padding: int = 0,
) -> None:
    pages = fill_pages([20, 4, 160], heads, head_size, page_size, dtype)
    offsets = [0]
    for _sequence, _first, length in chunks:
        offsets.append(offsets[-1] + length)
    query = random(offsets[-1] + padding, heads, head_size, dtype=dtype, seed=99)
    scale = head_size**-0.5
    out = apart(torch.full((len(query), heads * head_size), 7.0, dtype=dtype))
    attended = out.view(query.shape)
    kernels.paged_prefill_attention(
        query,
        pages.key_cache,
        pages.value_cache,
        pages.page_table,
        pages.rows[[sequence for sequence, _, _ in chunks]],
        int32(offsets),
        int32([first for _, first, _ in chunks]),
        scale,
        attended,
    )
    assert is_whole_around(out)
    assert (attended[offsets[-1] :] == 7).all()
    for start, (sequence, first, length) in zip(offsets, chunks, strict=False):
        if not length:
            continue
        part = slice(start, start + length)
        inputs = query[part], pages.keys[sequence], pages.values[sequence]
        assert_exact_as_torch(attended[part], attention, *inputs, list(range(first, first + length)), scale)
