"""Attention of prompt chunks over their rows' pages."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_attention import gather_pages
from kernels.jit import LOG2_E, interpreted, jit, jit_for_any, tl


@dataclass(frozen=True)
class Tiling:
    """How a program works: on `queries` queries, with `positions` keys and values at a time."""

    queries: int
    positions: int
    stages: int
    """Steps that are loaded ahead, and one."""
    warps: int


TILING = Tiling(64, 64, 2, 4)
PRECISE_TILING = Tiling(32, 32, 2, 8)
"""For fp32, which has no tensor cores: the tiles take twice the registers."""


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    chunk_rows: Tensor,
    chunk_offsets: Tensor,
    chunk_positions: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """softmax(scale * q K^T + causal mask) V for chunks of consecutive positions, laid one behind the other.

    query: [N, heads, D]. key_cache, value_cache: [pages, heads, page_size, D]; they hold the chunks' own keys and
    values already. page_table: [rows, max_pages] int32. Chunk c: queries chunk_offsets[c]:chunk_offsets[c+1], of table
    row chunk_rows[c], at positions chunk_positions[c], chunk_positions[c]+1, ...; each attends to positions 0 up to
    its own (all int32, [C], offsets [C+1]). A chunk may be empty, and queries from chunk_offsets[C] on are no chunk's.
    out: [N, heads, D], overwritten but for queries of no chunk; its rows may lie apart. The twin reads the chunks'
    borders on the host.
    """
    page_size = key_cache.shape[2]
    offsets = chunk_offsets.tolist()
    for start, end, row, first in zip(
        offsets[:-1], offsets[1:], chunk_rows.tolist(), chunk_positions.tolist(), strict=True
    ):
        if start == end:
            continue
        context = first + end - start
        pages = page_table[row : row + 1, : -(-context // page_size)]
        keys, values = gather_pages(key_cache, value_cache, pages)
        chunk = query[None, start:end].transpose(1, 2)
        attended = attend_causal(chunk, keys[:, :, :context], values[:, :, :context], first, scale)
        out[start:end] = attended[0].transpose(0, 1)


def attend_causal(query: Tensor, keys: Tensor, values: Tensor, first_position: int, scale: float) -> Tensor:
    """Attend causally from query [R, heads, S, D] to keys and values [R, heads, first_position + S, D].

    Query s sits at position first_position + s. Returns [R, heads, S, D].
    """
    length, context = query.shape[2], keys.shape[2]
    if length == 1 or first_position == 0:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=length > 1, scale=scale)
    seen = torch.ones(length, context, dtype=torch.bool, device=query.device).tril_(first_position)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)


@jit
def _find_chunk(
    chunk_offsets: tl.tensor, chunks: tl.tensor, tile: tl.tensor, TILE_Q: tl.constexpr, TILE_C: tl.constexpr
) -> tl.tensor:
    """The chunk that a query tile belongs to.

    Chunk c owns the tiles from chunk_offsets[c] // TILE_Q + c up to the next chunk's first: never too few, at most one
    too many. The last chunk owns those of queries that are no chunk's as well.
    """
    before = tile * 0
    for start in range(0, chunks, TILE_C):
        chunk = start + tl.arange(0, TILE_C)
        first_tile = tl.load(chunk_offsets + chunk, mask=chunk < chunks, other=0) // TILE_Q + chunk
        before += tl.sum(((first_tile <= tile) & (chunk < chunks)).to(tl.int32), 0)
    return before - 1


@jit
def _attend_range(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    pages_of_row: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    query_positions: tl.tensor,
    scale: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    MASKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take positions start..end-1 into the online softmax; unless MASKED, every query sees them, and tiles are full."""
    dims, lanes = tl.arange(0, HEAD_SIZE), tl.arange(0, TILE_T)
    for first in tl.range(start, end, TILE_T, num_stages=STAGES):
        positions = first + lanes
        if MASKED:
            seen = positions < end
            pages = tl.load(pages_of_row + positions // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        else:
            pages = tl.load(pages_of_row + positions // PAGE_SIZE).to(tl.int64)
        where = ((pages * heads + head) * PAGE_SIZE + positions % PAGE_SIZE)[:, None] * HEAD_SIZE + dims[None, :]
        if MASKED:
            k = tl.load(keys + where, mask=seen[:, None], other=0).to(q.dtype)
            v = tl.load(values + where, mask=seen[:, None], other=0).to(q.dtype)
        else:
            k = tl.load(keys + where).to(q.dtype)
            v = tl.load(values + where).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(positions[None, :] <= query_positions[:, None], scores, -float("inf"))
        # The scale is positive, so that the largest score is the largest one scaled.
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        kept = tl.exp2(best - new_best)
        weights = tl.exp2(scores * scale - new_best[:, None])
        total = total * kept + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), v, sums * kept[:, None], input_precision="ieee")
        best = new_best
    return best, total, sums


@jit_for_any("chunks")
def _attend_tile(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_table: tl.tensor,
    chunk_rows: tl.tensor,
    chunk_offsets: tl.tensor,
    chunk_positions: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    table_stride: tl.tensor,
    out_stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_C: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One head of TILE_Q queries of one chunk, over all positions up to the last query's.

    The tiles of a chunk are begun with its last, which has the most to do.
    """
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    chunk = _find_chunk(chunk_offsets, chunks, tile, TILE_Q, TILE_C)
    offset, end = tl.load(chunk_offsets + chunk), tl.load(chunk_offsets + chunk + 1)
    start = offset + (tile - offset // TILE_Q - chunk) * TILE_Q
    if start >= end:
        return
    dims = tl.arange(0, HEAD_SIZE)
    entries = start + tl.arange(0, TILE_Q)
    inside = (entries < end)[:, None]
    first_position = tl.load(chunk_positions + chunk) - offset
    context = first_position + tl.minimum(start + TILE_Q, end)
    seen_by_all = (first_position + start + 1) // TILE_T * TILE_T
    pages_of_row = page_table + tl.load(chunk_rows + chunk).to(tl.int64) * table_stride
    places = (entries.to(tl.int64) * heads + head)[:, None] * HEAD_SIZE + dims[None, :]
    q = tl.load(query + places, mask=inside, other=0)
    if WIDEN:
        q = q.to(tl.float32)
    best = tl.full([TILE_Q], -float("inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    sums = tl.zeros([TILE_Q, HEAD_SIZE], tl.float32)
    for masked in tl.static_range(2):  # first what all queries see, then the diagonal
        best, total, sums = _attend_range(
            q,
            keys,
            values,
            pages_of_row,
            head,
            heads,
            seen_by_all * masked,
            context if masked else seen_by_all,
            first_position + entries,
            scale,
            best,
            total,
            sums,
            masked,
            PAGE_SIZE,
            HEAD_SIZE,
            TILE_T,
            STAGES,
        )
    places = (entries.to(tl.int64) * out_stride + head * HEAD_SIZE)[:, None] + dims[None, :]
    tl.store(out + places, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def triton_paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    chunk_rows: Tensor,
    chunk_offsets: Tensor,
    chunk_positions: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """`paged_prefill_attention` in Triton: softmax(scale * q K^T + causal mask) V over ragged chunks.

    A program attends from one tile of queries with an online softmax. The grid follows from N and C alone, and programs
    find their chunk on the device: the host reads nothing.
    """
    assert query.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    length, heads, head_size = query.shape
    assert page_table.stride(1) == 1 and out.stride()[1:] == (head_size, 1)
    chunks = chunk_rows.shape[0]
    tiling = PRECISE_TILING if query.dtype == torch.float32 else TILING
    _attend_tile[(heads, length // tiling.queries + chunks)](
        query,
        key_cache,
        value_cache,
        page_table,
        chunk_rows,
        chunk_offsets,
        chunk_positions,
        out,
        scale * LOG2_E,
        chunks,
        heads,
        page_table.stride(0),
        out.stride(0),
        PAGE_SIZE=key_cache.shape[2],
        HEAD_SIZE=head_size,
        WIDEN=interpreted(),
        TILE_Q=tiling.queries,
        TILE_T=tiling.positions,
        TILE_C=128,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
    )
