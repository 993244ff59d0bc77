"""Between the two products of a token decoder's layer: attention inside one block, and GELU, in one launch.

softmax(scale * q K^T + causal mask) V      with q and K rotated by their positions (`kernels.rotary`)
gelu(up)                                    (`kernels.gelu`)

Neither needs the other, and of few rows a launch costs more than either.
"""

from torch import Tensor

from kernels.gelu import gelu_into, gelu_of
from kernels.jit import LOG2_E, cdiv, jit, jit_for_any, power_of_2, tl
from kernels.late_norm import LateNorm, late_factor, load_normalised, normalise_late
from kernels.prefill_attention import attend_causal
from kernels.rotary import load_rotated, rotary_scratch_write

TILE_NUMBERS, NUM_WARPS = 512, 2
"""Numbers of queries, and as many of keys and of values, that one program holds at a time, and its warps."""
LATE_TILE_NUMBERS, LATE_NUM_WARPS = 1024, 4
"""Where each program has a norm to find first, for which it reads a whole position."""
GELU_NUMBERS = 1024
"""Numbers that one program takes the GELU of."""


def local_attention_and_gelu(
    into: Tensor,
    norm: LateNorm | None,
    first_position: int,
    table: Tensor,
    key_scratch: Tensor,
    value_scratch: Tensor,
    scale: float,
    inner: Tensor,
) -> None:
    """inner = [attention(qkv) | gelu(up)] of into = [qkv | up], or with `norm` of what that makes of `into`.

    Stores the keys and values of new positions in the scratch cache and attends from them to all so far.

    into: [R, S, heads * 3 * D + F], overwritten; its entry [r, s] sits at position first_position + s of row r and
    attends to positions 0 up to its own. table: from `rotary_table`. key_scratch, value_scratch: [rows >= R, heads, P,
    D], positions in front of first_position written. inner: [R, S, heads * D + F], overwritten. Entries of `into` and
    of `inner` may lie apart, all by the same distance. F may be 0: then there is attention alone.
    """
    if norm is not None:
        into = normalise_late(into.flatten(0, 1), norm).view(into.shape)
    rows, length, _width = into.shape
    heads, head_size = key_scratch.shape[1], key_scratch.shape[3]
    width, end = heads * head_size, first_position + length
    query = rotary_scratch_write(into[..., : 3 * width], first_position, table, key_scratch, value_scratch)
    keys, values = key_scratch[:rows, :, :end], value_scratch[:rows, :, :end]
    # Torch's attention on a GPU reads past queries whose rows do not begin at multiples of 16 bytes, as `into`'s may.
    attended = attend_causal(query.transpose(1, 2).contiguous(), keys, values, first_position, scale)
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
    x: tl.tensor,
    missing: tl.tensor,
    missing_product: tl.tensor,
    bias: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    inner: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    first_position: tl.tensor,
    tile: tl.tensor,
    s: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    row_pairs: tl.tensor,
    length: tl.tensor,
    places: tl.tensor,
    stream_width: tl.tensor,
    into_stride: tl.tensor,
    inner_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_H: tl.constexpr,
    LATE: tl.constexpr,
) -> None:
    """The s-th new position of a tile of pairs of row and head: rotate, store, attend.

    Older positions come from the scratch cache; the new ones in front of the s-th are rotated once more instead, as
    other programs store them. With LATE a tile's pairs are of one row.
    """
    pair = tile * TILE_N + tl.arange(0, TILE_N)
    row, head = (pair // row_pairs).to(tl.int64), pair % row_pairs
    dims = tl.arange(0, HEAD_SIZE)
    inside = ((row < rows) & (head < heads))[:, None] & (dims < HEAD_SIZE)[None, :]
    first_entry = row * length
    only_entry = (tile * TILE_N // row_pairs).to(tl.int64) * length
    first = head[:, None] * 3 * HEAD_SIZE
    source = into + ((first_entry + s) * into_stride)[:, None]
    angles = table + (first_position + s) * ROTARY
    factor = late_factor(x, missing, only_entry + s, stream_width, eps, TILE_H) if LATE else 1.0
    q = load_rotated(source, first, factor, missing_product, bias, angles, dims, inside, ROTARY, LATE) * scale
    k = load_rotated(source, first + HEAD_SIZE, factor, missing_product, bias, angles, dims, inside, ROTARY, LATE)
    value_columns = first + 2 * HEAD_SIZE + dims[None, :]
    v = load_normalised(source, value_columns, factor, missing_product, bias, inside, LATE)
    where = ((row * heads + head) * places)[:, None] * HEAD_SIZE + dims[None, :]
    here = where + (first_position + s) * HEAD_SIZE
    tl.store(keys + here, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + here, v.to(values.dtype.element_ty), mask=inside)
    best = tl.sum(q * k, 1)
    total = tl.full([TILE_N], 1.0, tl.float32)
    sums = v
    for position in range(first_position):
        k = tl.load(keys + where + position * HEAD_SIZE, mask=inside, other=0).to(tl.float32)
        v = tl.load(values + where + position * HEAD_SIZE, mask=inside, other=0).to(tl.float32)
        best, total, sums = _attend_to(q, k, v, best, total, sums)
    for new in range(s):
        source = into + ((first_entry + new) * into_stride)[:, None]
        angles = table + (first_position + new) * ROTARY
        factor = late_factor(x, missing, only_entry + new, stream_width, eps, TILE_H) if LATE else 1.0
        k = load_rotated(source, first + HEAD_SIZE, factor, missing_product, bias, angles, dims, inside, ROTARY, LATE)
        v = load_normalised(source, value_columns, factor, missing_product, bias, inside, LATE)
        best, total, sums = _attend_to(q, k, v, best, total, sums)
    result = (sums / total[:, None]).to(inner.dtype.element_ty)
    to_inner = (first_entry + s) * inner_stride + head * HEAD_SIZE
    tl.store(inner + to_inner[:, None] + dims[None, :], result, mask=inside)


@jit_for_any("rows")
def _attend_and_gelu(
    into: tl.tensor,
    x: tl.tensor,
    missing: tl.tensor,
    missing_product: tl.tensor,
    bias: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    inner: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    first_position: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    row_pairs: tl.tensor,
    length: tl.tensor,
    places: tl.tensor,
    stream_width: tl.tensor,
    gelu_width: tl.tensor,
    into_stride: tl.tensor,
    inner_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_H: tl.constexpr,
    LATE: tl.constexpr,
) -> None:
    """A tile of pairs and new positions to attend from, or behind all of those a part of one position's GELU."""
    program, tiles = tl.program_id(0), tl.cdiv(rows * row_pairs, TILE_N)
    if program < tiles * length:
        _attend_pairs(
            into,
            x,
            missing,
            missing_product,
            bias,
            table,
            keys,
            values,
            inner,
            scale,
            eps,
            first_position,
            program % tiles,
            program // tiles,
            rows,
            heads,
            row_pairs,
            length,
            places,
            stream_width,
            into_stride,
            inner_stride,
            HEAD_SIZE,
            ROTARY,
            TILE_N,
            TILE_H,
            LATE,
        )
    else:
        part, parts = program - tiles * length, tl.cdiv(gelu_width, TILE_F)
        entry, width = (part // parts).to(tl.int64), heads * HEAD_SIZE
        place = part % parts * TILE_F + tl.arange(0, TILE_F)
        inside = place < gelu_width
        factor = late_factor(x, missing, entry, stream_width, eps, TILE_H) if LATE else 1.0
        source = into + entry * into_stride
        y = load_normalised(source, 3 * width + place, factor, missing_product, bias, inside, LATE)
        tl.store(inner + entry * inner_stride + width + place, gelu_of(y).to(inner.dtype.element_ty), mask=inside)


def triton_local_attention_and_gelu(
    into: Tensor,
    norm: LateNorm | None,
    first_position: int,
    table: Tensor,
    key_scratch: Tensor,
    value_scratch: Tensor,
    scale: float,
    inner: Tensor,
) -> None:
    """`local_attention_and_gelu` in Triton: [softmax(scale * q K^T + causal mask) V | gelu(up)] in one launch.

    A program takes one new position of a few pairs of row and head through an online softmax, or a part of one
    position's `up`; with `norm` it finds by itself what normalises its position. All but the entries of `into` and
    `inner` contiguous; `into` is left as it is.
    """
    assert table.is_contiguous() and key_scratch.is_contiguous() and value_scratch.is_contiguous()
    assert norm is None or norm.x.is_contiguous()
    rows, length, _width = into.shape
    _rows, heads, places, head_size = key_scratch.shape
    assert first_position + length <= places
    assert into.stride(2) == inner.stride(2) == 1
    gelu_width = inner.shape[2] - heads * head_size
    assert into.shape[2] - 3 * heads * head_size == gelu_width
    tile_numbers, num_warps = (TILE_NUMBERS, NUM_WARPS) if norm is None else (LATE_TILE_NUMBERS, LATE_NUM_WARPS)
    tile_n = min(power_of_2(rows * heads if norm is None else heads), max(1, tile_numbers // head_size))
    row_pairs = heads if norm is None else cdiv(heads, tile_n) * tile_n
    tile_f = min(power_of_2(max(gelu_width, 1)), GELU_NUMBERS)
    programs = length * (cdiv(rows * row_pairs, tile_n) + rows * cdiv(gelu_width, tile_f))
    _attend_and_gelu[(programs,)](
        into,
        norm and norm.x,
        norm and norm.missing,
        norm and norm.missing_product,
        norm and norm.bias,
        table,
        key_scratch,
        value_scratch,
        inner,
        scale * LOG2_E,
        norm.eps if norm else 0.0,
        first_position,
        rows,
        heads,
        row_pairs,
        length,
        places,
        norm.x.shape[1] if norm else 0,
        gelu_width,
        _position_stride(into),
        _position_stride(inner),
        HEAD_SIZE=head_size,
        ROTARY=table.shape[1],
        TILE_N=tile_n,
        TILE_F=tile_f,
        TILE_H=power_of_2(norm.x.shape[1]) if norm else 1,
        LATE=norm is not None,
        num_warps=num_warps,
    )


def _position_stride(x: Tensor) -> int:
    """Numbers from one position of x [R, S, ...] to the next, the same within a row and from row to row."""
    rows, length = x.shape[:2]
    stride = x.stride(1) if length > 1 else x.stride(0)
    # The stride of a dimension of one means nothing.
    assert rows == 1 or x.stride(0) == length * stride
    return stride
