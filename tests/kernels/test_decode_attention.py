"""Paged decode attention against the formula: ragged contexts, every head size and dtype."""

import pytest
import torch
from torch.testing import assert_close

from kernels import decode_attention
from kernels.decode_attention import paged_decode_attention
from kernels.dispatch import Kernels, select_kernels
from kernels.rotary import rotary_table
from tests.kernels.pages import fill_pages
from tests.kernels.reference import DTYPES, apart, assert_exact_as_torch, attention, int32, is_whole_around, random

CUDA = torch.device("cuda")
LENGTHS = ([1], [1, 8, 9, 64, 3], [40, 16, 17], [7, 7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "head_size", "page_size"), [(1, 16, 8), (3, 32, 16), (2, 64, 32), (5, 128, 8)])
def test_ragged(
    kernels: Kernels, dtype: torch.dtype, lengths: list[int], heads: int, head_size: int, page_size: int
) -> None:
    pages = fill_pages(lengths, heads, head_size, page_size, dtype)
    query = random(len(lengths), heads, head_size, dtype=dtype, seed=99)
    scale = head_size**-0.5
    out = apart(torch.empty(len(lengths), heads * head_size, dtype=dtype))
    attended = out.view(query.shape)
    kernels.paged_decode_attention(
        query, pages.key_cache, pages.value_cache, pages.page_table, pages.rows, int32(lengths), scale, attended
    )
    assert is_whole_around(out)
    for index, length in enumerate(lengths):
        inputs = query[index, None], pages.keys[index], pages.values[index]
        assert_exact_as_torch(attended[index, None], attention, *inputs, [length - 1], scale)


def test_a_row_may_be_asked_twice_and_with_less_context_than_it_has(kernels: Kernels) -> None:
    pages = fill_pages([30, 5], 2, 16, 8, torch.float32)
    query = random(1, 2, 16).repeat(3, 1, 1)
    rows = pages.rows[[0, 1, 0]]
    attended = torch.empty_like(query)
    kernels.paged_decode_attention(
        query, pages.key_cache, pages.value_cache, pages.page_table, rows, int32([12, 5, 30]), 0.25, attended
    )
    for entry, (sequence, length) in enumerate([(0, 12), (1, 5), (0, 30)]):
        inputs = query[entry, None], pages.keys[sequence], pages.values[sequence]
        assert_exact_as_torch(attended[entry, None], attention, *inputs, [length - 1], 0.25)


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [33, 2, 17, 64, 1, 9, 40]
    pages = fill_pages(lengths, 2, 16, 8, torch.float32)
    query = random(len(lengths), 2, 16)
    results = []
    for elements in (1, 64 * 2 * 16 * 3, 1 << 30):
        monkeypatch.setattr(decode_attention, "CPU_GROUP_ELEMENTS", elements)
        attended = torch.empty_like(query)
        paged_decode_attention(
            query, pages.key_cache, pages.value_cache, pages.page_table, pages.rows, int32(lengths), 0.25, attended
        )
        results.append(attended)
    for other in results[1:]:
        assert_close(other, results[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_splits", [1, 2, 16])
@pytest.mark.parametrize(("head_size", "page_size"), [(16, 8), (128, 64)])
def test_splits(
    monkeypatch: pytest.MonkeyPatch,
    triton_kernels: Kernels,
    dtype: torch.dtype,
    max_splits: int,
    head_size: int,
    page_size: int,
) -> None:
    """Contexts of one split, of several, at their borders, and of more than there are programs."""
    monkeypatch.setattr(decode_attention, "SPLIT_POSITIONS", 64)
    monkeypatch.setattr(decode_attention, "MAX_SPLITS", max_splits)
    lengths = [1, 64, 65, 128, 129, 300]
    pages = fill_pages(lengths, 2, head_size, page_size, dtype)
    query = random(len(lengths), 2, head_size, dtype=dtype, seed=99)
    out = apart(torch.empty(len(lengths), 2 * head_size, dtype=dtype))
    attended = out.view(query.shape)
    triton_kernels.paged_decode_attention(
        query, pages.key_cache, pages.value_cache, pages.page_table, pages.rows, int32(lengths), 0.3, attended
    )
    assert is_whole_around(out)
    for index, length in enumerate(lengths):
        inputs = query[index, None], pages.keys[index], pages.values[index]
        assert_exact_as_torch(attended[index, None], attention, *inputs, [length - 1], 0.3)


def test_many_rows_are_not_cut(triton_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as are enough, no more: with one of them a head, there is nothing to add up."""
    monkeypatch.setattr(decode_attention, "SPLIT_POSITIONS", 64)
    monkeypatch.setattr(decode_attention, "_combine_splits", None)
    monkeypatch.setattr(decode_attention, "ENOUGH_PROGRAMS", 7)
    lengths = [300, 1, 64, 129]
    pages = fill_pages(lengths, 1, 16, 8, torch.float32)
    query = random(4, 1, 16, seed=99)
    attended = torch.empty_like(query)
    triton_kernels.paged_decode_attention(
        query, pages.key_cache, pages.value_cache, pages.page_table, pages.rows, int32(lengths), 0.3, attended
    )
    for index, length in enumerate(lengths):
        inputs = query[index, None], pages.keys[index], pages.values[index]
        assert_exact_as_torch(attended[index, None], attention, *inputs, [length - 1], 0.3)


def test_a_long_row_changes_no_bit_of_the_others(triton_kernels: Kernels) -> None:
    lengths = [5, 1500, 530, 90]
    pages = fill_pages(lengths, 1, 32, 16, torch.float32)
    query = random(4, 1, 32)

    def attend(which: list[int]) -> torch.Tensor:
        attended = torch.empty_like(query[which])
        triton_kernels.paged_decode_attention(
            query[which],
            pages.key_cache,
            pages.value_cache,
            pages.page_table,
            pages.rows[which],
            int32([lengths[entry] for entry in which]),
            0.2,
            attended,
        )
        return attended

    together = attend([0, 1, 2, 3])
    assert torch.equal(attend([2, 0, 3]), together[[2, 0, 3]])
    assert torch.equal(attend([3]), together[[3]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs caches of gigabytes")
def test_offsets_beyond_31_bits() -> None:
    kernels = select_kernels(torch.device("cuda"))
    heads, page_size, head_size = 8, 64, 128
    count = (1 << 31) // (heads * page_size * head_size) + 3
    shape = (count, heads, page_size, head_size)
    keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    length = 100
    qkv = random(length, heads * 3 * head_size, dtype=torch.bfloat16)
    parts = qkv.clone().view(length, heads, 3, head_size)
    slots = (count - 2) * page_size + torch.arange(length)
    kernels.rotary_paged_write(
        qkv.cuda(), torch.zeros(length).int().cuda(), slots.cuda(), rotary_table(1, 32, 1e4, CUDA), keys, values
    )
    table = int32([count - 2, count - 1])[None].cuda()
    rows, lengths = torch.zeros(1).int().cuda(), int32([length]).cuda()
    query = parts[-1:, :, 0]
    attended = torch.empty(query.shape, dtype=query.dtype, device=CUDA)
    kernels.paged_decode_attention(query.contiguous().cuda(), keys, values, table, rows, lengths, 0.1, attended)
    inputs = query, parts[:, :, 1], parts[:, :, 2]
    assert_exact_as_torch(attended.cpu(), attention, *inputs, [length - 1], 0.1)
    kernels.paged_prefill_attention(
        query.contiguous().cuda(), keys, values, table, rows, int32([0, 1]).cuda(), lengths - 1, 0.1, attended.zero_()
    )
    assert_exact_as_torch(attended.cpu(), attention, *inputs, [length - 1], 0.1)
