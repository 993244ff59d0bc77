"""Attention inside one block: the token decoder's, over its scratch cache.

softmax(scale * q K^T + causal mask) V      with q and K rotated by their positions (`kernels.rotary`)
"""

from torch import Tensor

from kernels.jit import LOG2_E, cdiv, jit, power_of_2, tl
from kernels.prefill_attention import attend_causal
from kernels.rotary import load_rotated, rotary_scratch_write

TILE_NUMBERS = 1024
"""Numbers of queries, and as many of keys and of values, that one program holds at a time."""
NUM_WARPS = 4


def rotary_local_attention(
    qkv: Tensor,
    first_position: int,
    table: Tensor,
    key_scratch: Tensor,
    value_scratch: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Store the keys and values of new positions in the scratch cache and attend from them to all so far.

    qkv: [R, S, heads * 3 * D], overwritten; its entry [r, s] sits at position first_position + s of row r and attends
    to positions 0 up to its own. table: from `rotary_table`. key_scratch, value_scratch: [rows >= R, heads, P, D],
    positions in front of first_position written. out: [R, S, heads, D], overwritten. Entries of `qkv` and of `out` may
    lie apart, all by the same distance.
    """
    query = rotary_scratch_write(qkv, first_position, table, key_scratch, value_scratch)
    rows, length = query.shape[:2]
    end = first_position + length
    keys, values = key_scratch[:rows, :, :end], value_scratch[:rows, :, :end]
    out.copy_(attend_causal(query.transpose(1, 2), keys, values, first_position, scale).transpose(1, 2))


@jit
def _attend_to(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, best: tl.tensor, total: tl.tensor, sums: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take one more position into the online softmax of each pair: q, k, v, sums [TILE_N, D]."""
    score = tl.sum(q * k, 1)
    new_best = tl.maximum(best, score)
    kept, weight = tl.exp2(best - new_best), tl.exp2(score - new_best)
    return new_best, total * kept + weight, sums * kept[:, None] + weight[:, None] * v


@jit
def _attend_pairs(
    qkv: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    first_position: tl.tensor,
    pairs: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    places: tl.tensor,
    qkv_stride: tl.tensor,
    out_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_N: tl.constexpr,
) -> None:
    """The s-th new position of some pairs of row and head: rotate, store, attend.

    Older positions come from the scratch cache; the new ones in front of the s-th are rotated once more instead, as
    other programs store them.
    """
    pair = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    s = tl.program_id(1)
    dims = tl.arange(0, HEAD_SIZE)
    inside = (pair < pairs)[:, None] & (dims < HEAD_SIZE)[None, :]
    pair = pair.to(tl.int64)
    first_entry, head = pair // heads * length, pair % heads
    first_source = qkv + first_entry * qkv_stride + head * 3 * HEAD_SIZE
    source = first_source + s * qkv_stride
    angles = table + (first_position + s) * ROTARY
    q = load_rotated(source, angles, dims, inside, ROTARY) * scale
    k = load_rotated(source + HEAD_SIZE, angles, dims, inside, ROTARY)
    v = tl.load((source + 2 * HEAD_SIZE)[:, None] + dims[None, :], mask=inside, other=0)
    where = (pair * places)[:, None] * HEAD_SIZE + dims[None, :]
    here = where + (first_position + s) * HEAD_SIZE
    tl.store(keys + here, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + here, v, mask=inside)
    best = tl.sum(q * k, 1)
    total = tl.full([TILE_N], 1.0, tl.float32)
    sums = v.to(tl.float32)
    for position in range(first_position):
        k = tl.load(keys + where + position * HEAD_SIZE, mask=inside, other=0).to(tl.float32)
        v = tl.load(values + where + position * HEAD_SIZE, mask=inside, other=0)
        best, total, sums = _attend_to(q, k, v.to(tl.float32), best, total, sums)
    for new in range(s):
        source = first_source + new * qkv_stride
        k = load_rotated(source + HEAD_SIZE, table + (first_position + new) * ROTARY, dims, inside, ROTARY)
        v = tl.load((source + 2 * HEAD_SIZE)[:, None] + dims[None, :], mask=inside, other=0)
        best, total, sums = _attend_to(q, k, v.to(tl.float32), best, total, sums)
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    to_out = (first_entry + s) * out_stride + head * HEAD_SIZE
    tl.store(out + to_out[:, None] + dims[None, :], result, mask=inside)


def triton_rotary_local_attention(
    qkv: Tensor,
    first_position: int,
    table: Tensor,
    key_scratch: Tensor,
    value_scratch: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """`rotary_local_attention` in Triton: softmax(scale * q K^T + causal mask) V over a block's few positions.

    A program takes one new position of a few pairs of row and head through an online softmax. All but the rows of
    `qkv` and `out` contiguous; `qkv` is left as it is.
    """
    assert table.is_contiguous() and key_scratch.is_contiguous() and value_scratch.is_contiguous()
    rows, length, _width = qkv.shape
    _rows, heads, places, head_size = key_scratch.shape
    assert first_position + length <= places
    assert qkv.stride(2) == 1 and out.stride()[2:] == (head_size, 1)
    tile_n = min(power_of_2(rows * heads), max(1, TILE_NUMBERS // head_size))
    _attend_pairs[(cdiv(rows * heads, tile_n), length)](
        qkv,
        table,
        key_scratch,
        value_scratch,
        out,
        scale * LOG2_E,
        first_position,
        rows * heads,
        heads,
        length,
        places,
        _position_stride(qkv),
        _position_stride(out),
        HEAD_SIZE=head_size,
        ROTARY=table.shape[1],
        TILE_N=tile_n,
        num_warps=NUM_WARPS,
    )


def _position_stride(x: Tensor) -> int:
    """Numbers from one position of x [R, S, ...] to the next, the same within a row and from row to row."""
    rows, length = x.shape[:2]
    stride = x.stride(1) if length > 1 else x.stride(0)
    # The stride of a dimension of one means nothing.
    assert rows == 1 or x.stride(0) == length * stride
    return stride
