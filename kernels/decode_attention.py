"""Attention of one new position a row over the row's pages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import LOG2_E, cdiv, jit, power_of_2, tl

CPU_GROUP_ELEMENTS = 1 << 18
"""Numbers gathered at once on the CPU: a copy that stays in the core's cache costs half of one that does not."""
SPLIT_POSITIONS = 512
"""Positions that one program attends to; a multiple of TILE_POSITIONS."""
MAX_SPLITS = 16
"""Programs a head of a row at most: with more splits than that, each program takes several."""
ENOUGH_PROGRAMS = 16384
"""Programs that fill any device several times over: heads of rows are cut no further than into this many."""
TILE_POSITIONS = 32
STAGES = 3
NUM_WARPS = 4
LOWEST = tl.constexpr(-1e30)
"""Stands for minus infinity where a difference of two must not be NaN."""


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    row_index: Tensor,
    context_lengths: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """softmax(scale * q K^T) V for one query a row, over the row's cached positions.

    query: [R, heads, D]. key_cache, value_cache: [pages, heads, page_size, D]. page_table: [rows, max_pages] int32, the
    pages of each row in order of position. row_index: [R] int32: entry i reads table row row_index[i], positions
    0..context_lengths[i]-1 (int32, at least 1). Whatever else those pages hold has no effect. out: [R, heads, D],
    overwritten; its rows may lie apart.
    """
    pages = page_table.index_select(0, row_index)
    if query.device.type != "cpu":  # the lengths cannot be read without waiting for the device
        out.copy_(_attend_rows(query, key_cache, value_cache, pages, context_lengths, scale))
        return
    _pages, heads, page_size, head_size = key_cache.shape
    group = max(1, CPU_GROUP_ELEMENTS // (int(context_lengths.max()) * heads * head_size))
    for some_query, some_pages, lengths, some_out in zip(
        query.split(group), pages.split(group), context_lengths.split(group), out.split(group), strict=True
    ):
        used = -(-int(lengths.max()) // page_size)
        some_out.copy_(_attend_rows(some_query, key_cache, value_cache, some_pages[:, :used], lengths, scale))


def _attend_rows(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Tensor, context_lengths: Tensor, scale: float
) -> Tensor:
    """Attention of query [R, heads, D] to the first context_lengths [R] positions of pages [R, n]."""
    keys, values = gather_pages(key_cache, value_cache, pages)
    seen = torch.arange(keys.shape[2], device=query.device) < context_lengths[:, None]
    return attend_masked(query[:, :, None], keys, values, seen[:, None, None], scale).squeeze(2)


def gather_pages(key_cache: Tensor, value_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Copy pages [R, n] of caches [pages, heads, page_size, D] to one piece a row, [R, heads, n * page_size, D]."""
    _pages, heads, page_size, head_size = key_cache.shape
    rows, count = pages.shape
    # One line is one head's part of a page: gathering lines head by head saves transposing the result.
    first = pages * heads
    lines = (first[:, None] + torch.arange(heads, device=pages.device, dtype=pages.dtype)[:, None]).view(-1)
    shape = (rows, heads, count * page_size, head_size)
    keys = key_cache.view(-1, page_size * head_size).index_select(0, lines)
    values = value_cache.view(-1, page_size * head_size).index_select(0, lines)
    return keys.view(shape), values.view(shape)


def attend_masked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attend from query [R, heads, S, D] to keys and values [R, heads, T, D] where `seen` [R, 1, S, T] is True.

    Positions that no query sees may hold anything, also NaN (`keys` and `values` may be overwritten there).
    """
    if query.device.type == "cpu":
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
        if bool(attended.isfinite().all()):
            return attended
    # A weight of zero does not silence a NaN that another request left in a page: erase what is unseen. Only in the
    # rare case on the CPU, as it is slower there than the attention itself.
    unseen = ~seen.any(2)[..., None]
    keys, values = keys.masked_fill_(unseen, 0), values.masked_fill_(unseen, 0)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)


@jit
def _attend_split(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_table: tl.tensor,
    row_index: tl.tensor,
    context_lengths: tl.tensor,
    out: tl.tensor,
    partial_sums: tl.tensor,
    partial_stats: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    table_stride: tl.tensor,
    splits: tl.tensor,
    split_positions: tl.tensor,
    out_stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One head of one row over every `splits`-th piece of `split_positions`, beginning with its own.

    Each of the TILE_T lanes keeps a softmax of its own, so that the loop has nothing to exchange between threads.
    """
    head, entry, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(context_lengths + entry)
    if split * split_positions >= length:
        return
    lanes, dims = tl.arange(0, TILE_T), tl.arange(0, HEAD_SIZE)
    pages_of_row = page_table + tl.load(row_index + entry).to(tl.int64) * table_stride
    line = entry * heads + head
    q = tl.load(query + line * HEAD_SIZE + dims).to(tl.float32) * scale
    best = tl.full([TILE_T], LOWEST, tl.float32)
    total = tl.zeros([TILE_T], tl.float32)
    sums = tl.zeros([TILE_T, HEAD_SIZE], tl.float32)
    for start in range(split * split_positions, length, splits * split_positions):
        end = tl.minimum(start + split_positions, length)
        for first in tl.range(start, end, TILE_T, num_stages=STAGES):
            positions = first + lanes
            seen = positions < end
            pages = tl.load(pages_of_row + positions // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            where = ((pages * heads + head) * PAGE_SIZE + positions % PAGE_SIZE)[:, None] * HEAD_SIZE + dims[None, :]
            k = tl.load(keys + where, mask=seen[:, None], other=0).to(tl.float32)
            v = tl.load(values + where, mask=seen[:, None], other=0).to(tl.float32)
            scores = tl.where(seen, tl.sum(k * q[None, :], 1), -float("inf"))
            new_best = tl.maximum(best, scores)
            kept = tl.exp2(best - new_best)
            weights = tl.exp2(scores - new_best)
            total = total * kept + weights
            sums = sums * kept[:, None] + weights[:, None] * v
            best = new_best
    top = tl.max(best, 0)
    kept = tl.exp2(best - top)
    weight = tl.sum(total * kept, 0)
    result = tl.sum(sums * kept[:, None], 0)
    if (length <= split_positions) | (splits == 1):  # there is nothing to combine
        tl.store(out + entry * out_stride + head * HEAD_SIZE + dims, (result / weight).to(out.dtype.element_ty))
    else:
        part = line * splits + split
        tl.store(partial_sums + part * HEAD_SIZE + dims, result)
        tl.store(partial_stats + part * 2, top)
        tl.store(partial_stats + part * 2 + 1, weight)


@jit
def _combine_splits(
    partial_sums: tl.tensor,
    partial_stats: tl.tensor,
    context_lengths: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    split_positions: tl.tensor,
    out_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    TILE_S: tl.constexpr,
) -> None:
    """Add up what the splits of one head of one row have found."""
    head, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(context_lengths + entry)
    if length <= split_positions:
        return
    dims = tl.arange(0, HEAD_SIZE)
    split = tl.arange(0, TILE_S)
    used = split < tl.minimum((length + split_positions - 1) // split_positions, splits)
    line = entry * heads + head
    part = line * splits + split
    best = tl.load(partial_stats + part * 2, mask=used, other=LOWEST)
    total = tl.load(partial_stats + part * 2 + 1, mask=used, other=0)
    kept = tl.exp2(best - tl.max(best, 0))
    sums = tl.load(partial_sums + part[:, None] * HEAD_SIZE + dims[None, :], mask=used[:, None], other=0)
    result = tl.sum(sums * kept[:, None], 0) / tl.sum(total * kept, 0)
    tl.store(out + entry * out_stride + head * HEAD_SIZE + dims, result.to(out.dtype.element_ty))


def triton_paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    row_index: Tensor,
    context_lengths: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """`paged_decode_attention` in Triton: softmax(scale * q K^T) V, one query a row.

    A context is cut into splits of SPLIT_POSITIONS, which programs of their own attend to with the running maximum m
    and sum l of an online softmax; a second kernel adds them up: sum_i 2^(m_i - m) sums_i / sum_i 2^(m_i - m) l_i.
    Where rows and heads fill the device, one program takes the whole context: programs without work would cost as much
    as short contexts do. The cuts follow from shapes and the row's own length, never from other rows' lengths: batches
    of other sizes differ in rounding, as cuBLAS's do. Nothing is read on the host.
    """
    assert query.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    rows, heads, head_size = query.shape
    assert page_table.stride(1) == 1 and out.stride()[1:] == (head_size, 1)
    page_size = key_cache.shape[2]
    room = page_table.shape[1] * page_size
    splits = max(1, min(cdiv(room, SPLIT_POSITIONS), MAX_SPLITS, ENOUGH_PROGRAMS // (rows * heads)))
    split_positions = SPLIT_POSITIONS if splits > 1 else cdiv(room, TILE_POSITIONS) * TILE_POSITIONS
    stored = rows if splits > 1 else 0
    partial_sums = query.new_empty(stored, heads, splits, head_size, dtype=torch.float32)
    partial_stats = query.new_empty(stored, heads, splits, 2, dtype=torch.float32)
    _attend_split[(heads, rows, splits)](
        query,
        key_cache,
        value_cache,
        page_table,
        row_index,
        context_lengths,
        out,
        partial_sums,
        partial_stats,
        scale * LOG2_E,
        heads,
        page_table.stride(0),
        splits,
        split_positions,
        out.stride(0),
        PAGE_SIZE=page_size,
        HEAD_SIZE=head_size,
        TILE_T=TILE_POSITIONS,
        STAGES=STAGES,
        num_warps=NUM_WARPS,
    )
    if splits > 1:
        _combine_splits[(heads, rows)](
            partial_sums,
            partial_stats,
            context_lengths,
            out,
            heads,
            splits,
            split_positions,
            out.stride(0),
            HEAD_SIZE=head_size,
            TILE_S=power_of_2(splits),
            num_warps=2,
        )
