"""Between the two products of a token decoder's layer: attention inside one block, and GELU, in one launch.

softmax(scale * q K^T + causal mask) V      with q and K rotated by their positions (`kernels.rotary`)
gelu(up)                                    (`kernels.gelu`)

Neither needs the other, and of few rows a launch costs more than either.
"""

from torch import Tensor

from kernels.gelu import gelu_into, gelu_part
from kernels.jit import LOG2_E, cdiv, jit, power_of_2, tl
from kernels.prefill_attention import attend_causal
from kernels.rotary import load_rotated, rotary_scratch_write

TILE_NUMBERS = 1024
"""Numbers of queries, and as many of keys and of values, that one program holds at a time."""
GELU_NUMBERS = 1024
"""Numbers that one program takes the GELU of."""
NUM_WARPS = 4


def local_attention_and_gelu(
    into: Tensor,
    first_position: int,
    table: Tensor,
    key_scratch: Tensor,
    value_scratch: Tensor,
    scale: float,
    inner: Tensor,
) -> None:
    """inner = [attention(qkv) | gelu(up)] of into = [qkv | up].

    Stores the keys and values of new positions in the scratch cache and attends from them to all so far.

    into: [R, S, heads * 3 * D + F], overwritten; its entry [r, s] sits at position first_position + s of row r and
    attends to positions 0 up to its own. table: from `rotary_table`. key_scratch, value_scratch: [rows >= R, heads, P,
    D], positions in front of first_position written. inner: [R, S, heads * D + F], overwritten. Entries of `into` and
    of `inner` may lie apart, all by the same distance.
    """
    rows, length, _width = into.shape
    heads, head_size = key_scratch.shape[1], key_scratch.shape[3]
    width, end = heads * head_size, first_position + length
    query = rotary_scratch_write(into[..., : 3 * width], first_position, table, key_scratch, value_scratch)
    keys, values = key_scratch[:rows, :, :end], value_scratch[:rows, :, :end]
    attended = attend_causal(query.transpose(1, 2), keys, values, first_position, scale)
    inner[..., :width].view(query.shape).copy_(attended.transpose(1, 2))
    gelu_into(into[..., 3 * width :], inner[..., width:])


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
    into: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    inner: tl.tensor,
    scale: tl.tensor,
    first_position: tl.tensor,
    tile: tl.tensor,
    s: tl.tensor,
    pairs: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    places: tl.tensor,
    into_stride: tl.tensor,
    inner_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_N: tl.constexpr,
) -> None:
    """The s-th new position of a tile of pairs of row and head: rotate, store, attend.

    Older positions come from the scratch cache; the new ones in front of the s-th are rotated once more instead, as
    other programs store them.
    """
    pair = tile * TILE_N + tl.arange(0, TILE_N)
    dims = tl.arange(0, HEAD_SIZE)
    inside = (pair < pairs)[:, None] & (dims < HEAD_SIZE)[None, :]
    pair = pair.to(tl.int64)
    first_entry, head = pair // heads * length, pair % heads
    first_source = into + first_entry * into_stride + head * 3 * HEAD_SIZE
    source = first_source + s * into_stride
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
        source = first_source + new * into_stride
        k = load_rotated(source + HEAD_SIZE, table + (first_position + new) * ROTARY, dims, inside, ROTARY)
        v = tl.load((source + 2 * HEAD_SIZE)[:, None] + dims[None, :], mask=inside, other=0)
        best, total, sums = _attend_to(q, k, v.to(tl.float32), best, total, sums)
    result = (sums / total[:, None]).to(inner.dtype.element_ty)
    to_inner = (first_entry + s) * inner_stride + head * HEAD_SIZE
    tl.store(inner + to_inner[:, None] + dims[None, :], result, mask=inside)


@jit
def _attend_and_gelu(
    into: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    inner: tl.tensor,
    scale: tl.tensor,
    first_position: tl.tensor,
    pairs: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    places: tl.tensor,
    gelu_width: tl.tensor,
    into_stride: tl.tensor,
    inner_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_F: tl.constexpr,
) -> None:
    """A tile of pairs and new positions to attend from, or behind all of those a part of one position's GELU."""
    program, tiles = tl.program_id(0), tl.cdiv(pairs, TILE_N)
    if program < tiles * length:
        _attend_pairs(
            into,
            table,
            keys,
            values,
            inner,
            scale,
            first_position,
            program % tiles,
            program // tiles,
            pairs,
            heads,
            length,
            places,
            into_stride,
            inner_stride,
            HEAD_SIZE,
            ROTARY,
            TILE_N,
        )
    else:
        part, parts = program - tiles * length, tl.cdiv(gelu_width, TILE_F)
        entry, width = (part // parts).to(tl.int64), heads * HEAD_SIZE
        source, out = into + entry * into_stride + 3 * width, inner + entry * inner_stride + width
        gelu_part(source, out, part % parts, gelu_width, TILE_F)


def triton_local_attention_and_gelu(
    into: Tensor,
    first_position: int,
    table: Tensor,
    key_scratch: Tensor,
    value_scratch: Tensor,
    scale: float,
    inner: Tensor,
) -> None:
    """`local_attention_and_gelu` in Triton: [softmax(scale * q K^T + causal mask) V | gelu(up)] in one launch.

    A program takes one new position of a few pairs of row and head through an online softmax, or a part of one
    position's `up`. All but the entries of `into` and `inner` contiguous; `into` is left as it is.
    """
    assert table.is_contiguous() and key_scratch.is_contiguous() and value_scratch.is_contiguous()
    rows, length, _width = into.shape
    _rows, heads, places, head_size = key_scratch.shape
    assert first_position + length <= places
    assert into.stride(2) == inner.stride(2) == 1
    gelu_width = inner.shape[2] - heads * head_size
    assert into.shape[2] - 3 * heads * head_size == gelu_width
    tile_n = min(power_of_2(rows * heads), max(1, TILE_NUMBERS // head_size))
    tile_f = min(power_of_2(gelu_width), GELU_NUMBERS)
    programs = length * (cdiv(rows * heads, tile_n) + rows * cdiv(gelu_width, tile_f))
    _attend_and_gelu[(programs,)](
        into,
        table,
        key_scratch,
        value_scratch,
        inner,
        scale * LOG2_E,
        first_position,
        rows * heads,
        heads,
        length,
        places,
        gelu_width,
        _position_stride(into),
        _position_stride(inner),
        HEAD_SIZE=head_size,
        ROTARY=table.shape[1],
        TILE_N=tile_n,
        TILE_F=tile_f,
        num_warps=NUM_WARPS,
    )


def _position_stride(x: Tensor) -> int:
    """Numbers from one position of x [R, S, ...] to the next, the same within a row and from row to row."""
    rows, length = x.shape[:2]
    stride = x.stride(1) if length > 1 else x.stride(0)
    # The stride of a dimension of one means nothing.
    assert rows == 1 or x.stride(0) == length * stride
    return stride
