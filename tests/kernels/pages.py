"""Paged caches for the kernels' tests: shuffled pages, and NaN wherever nothing was written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.reference import int32, random


@dataclass(frozen=True)
class Pages:
    """A cache that holds `lengths[i]` positions of sequence i, which sits in row `rows[i]` of the page table."""

    key_cache: Tensor
    value_cache: Tensor
    page_table: Tensor
    rows: Tensor
    keys: list[Tensor]
    """[lengths[i], heads, D] for each sequence."""
    values: list[Tensor]


def fill_pages(lengths: Sequence[int], heads: int, head_size: int, page_size: int, dtype: torch.dtype) -> Pages:
    """A cache with random keys and values of the given lengths."""
    rows = len(lengths) + 2
    max_pages = max(-(-length // page_size) for length in lengths) + 1
    generator = torch.Generator().manual_seed(sum(lengths))
    free = (1 + torch.randperm(rows * max_pages, generator=generator)).tolist()
    table = torch.zeros(rows, max_pages, dtype=torch.int32)
    places = torch.randperm(rows, generator=generator)[: len(lengths)].tolist()
    shape = (rows * max_pages + 1, heads, page_size, head_size)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    contents: list[list[Tensor]] = [[], []]
    for index, (row, length) in enumerate(zip(places, lengths, strict=True)):
        pages = [free.pop() for _ in range(-(-length // page_size))]
        table[row, : len(pages)] = int32(pages)
        for which, (cache, content) in enumerate(zip(caches, contents, strict=True)):
            data = random(length, heads, head_size, dtype=dtype, seed=2 * index + which)
            content.append(data)
            for position in range(length):
                cache[pages[position // page_size], :, position % page_size] = data[position]
    return Pages(caches[0], caches[1], table, int32(places), contents[0], contents[1])
