"""Attention inside one block: the token decoder's, over its scratch cache."""

import torch
from torch import Tensor

from kernels.jit import LOG2_E, cdiv, jit, power_of_2, tl
from kernels.prefill_attention import attend_causal

TILE_NUMBERS = 8192
"""Numbers of keys, and as many of values, that one program holds."""


def local_attention(
    query: Tensor, key_scratch: Tensor, value_scratch: Tensor, first_position: int, scale: float
) -> Tensor:
    """softmax(scale * q K^T + causal mask) V over the positions of the block being written.

    query: [R, S, heads, D]; entry [r, s] sits at position first_position + s and attends to positions 0 up to its own.
    key_scratch, value_scratch: [rows >= R, heads, P, D], positions 0..first_position+S-1 of rows 0..R-1 written.
    Returns [R, S, heads, D].
    """
    rows, length = query.shape[:2]
    end = first_position + length
    keys, values = key_scratch[:rows, :, :end], value_scratch[:rows, :, :end]
    return attend_causal(query.transpose(1, 2), keys, values, first_position, scale).transpose(1, 2)


@jit
def _attend_pairs(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    attended: tl.tensor,
    scale: tl.tensor,
    first_position: tl.tensor,
    pairs: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    places: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
) -> None:
    """The s-th query of some pairs of row and head, each over its whole scratch cache at once."""
    pair = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    s = tl.program_id(1)
    dims, position = tl.arange(0, HEAD_SIZE), tl.arange(0, TILE_P)
    inside = pair < pairs
    pair = pair.to(tl.int64)
    entry = (pair // heads * length + s) * heads + pair % heads
    where_query = entry[:, None] * HEAD_SIZE + dims[None, :]
    q = tl.load(query + where_query, mask=inside[:, None], other=0).to(tl.float32) * scale
    seen = inside[:, None] & (position <= first_position + s)[None, :]
    where = (pair[:, None] * places + position[None, :])[:, :, None] * HEAD_SIZE + dims[None, None, :]
    k = tl.load(keys + where, mask=seen[:, :, None], other=0).to(tl.float32)
    v = tl.load(values + where, mask=seen[:, :, None], other=0).to(tl.float32)
    scores = tl.where((position <= first_position + s)[None, :], tl.sum(q[:, None, :] * k, 2), -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    sums = tl.sum(weights[:, :, None] * v, 1)
    result = sums / tl.sum(weights, 1)[:, None]
    tl.store(attended + where_query, result.to(attended.dtype.element_ty), mask=inside[:, None])


def triton_local_attention(
    query: Tensor, key_scratch: Tensor, value_scratch: Tensor, first_position: int, scale: float
) -> Tensor:
    """`local_attention` in Triton: softmax(scale * q K^T + causal mask) V over a block's few positions.

    A program holds the whole scratch cache of a few pairs of row and head. Everything contiguous.
    """
    assert query.is_contiguous() and key_scratch.is_contiguous() and value_scratch.is_contiguous()
    rows, length, heads, head_size = query.shape
    places = key_scratch.shape[2]
    assert first_position + length <= places
    attended = torch.empty_like(query)
    tile_p = power_of_2(places)
    tile_n = min(power_of_2(rows * heads), max(1, TILE_NUMBERS // (tile_p * head_size)))
    _attend_pairs[(cdiv(rows * heads, tile_n), length)](
        query,
        key_scratch,
        value_scratch,
        attended,
        scale * LOG2_E,
        first_position,
        rows * heads,
        heads,
        length,
        places,
        HEAD_SIZE=head_size,
        TILE_N=tile_n,
        TILE_P=tile_p,
        num_warps=4,
    )
    return attended
