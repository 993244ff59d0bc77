"""Rotary position embedding, fused with storing keys and values.

The first `rotary_dims` dimensions of every query and key head are rotated in pairs (i, i + rotary_dims / 2):

    x'_i       = x_i cos(t_i) - x_{i+half} sin(t_i)
    x'_{i+half} = x_{i+half} cos(t_i) + x_i sin(t_i)        t_i = position * base^(-2 i / rotary_dims)

The fused projection lays each head out as [query | key | value] (GPT-NeoX).
"""

import torch
from torch import Tensor

from kernels.jit import cdiv, jit, power_of_2, tl
from kernels.late_norm import load_normalised


def rotary_table(max_positions: int, rotary_dims: int, base: float, device: torch.device) -> Tensor:
    """Cosines and sines for every position: [max_positions, rotary_dims] fp32, cosines in the first half."""
    exponents = torch.arange(0, rotary_dims, 2, dtype=torch.float32) / rotary_dims
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * base**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def rotary_paged_write(
    qkv: Tensor, positions: Tensor, slots: Tensor, table: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """Rotate queries and keys, store keys and values in the paged cache.

    qkv: [N, heads * 3 * D], whose rows may lie apart; overwritten. positions: [N] int32, in the sequence. slots: [N]
    int64, page * page_size + offset in the page. table: from `rotary_table`. key_cache, value_cache: [pages, heads,
    page_size, D]. Returns the queries [N, heads, D].
    """
    _pages, heads, page_size, head_size = key_cache.shape
    query, key, value = _rotate(qkv.view(-1, heads, 3, head_size), table.index_select(0, positions)[:, None, None])
    first = torch.div(slots, page_size, rounding_mode="floor") * ((heads - 1) * page_size) + slots
    lines = (first[:, None] + torch.arange(0, heads * page_size, page_size, device=slots.device)).flatten()
    key_cache.view(-1, head_size).index_copy_(0, lines, key.reshape(-1, head_size))
    value_cache.view(-1, head_size).index_copy_(0, lines, value.reshape(-1, head_size))
    return query


def rotary_scratch_write(
    qkv: Tensor, first_position: int, table: Tensor, key_scratch: Tensor, value_scratch: Tensor
) -> Tensor:
    """Rotate queries and keys, store keys and values in the scratch cache.

    qkv: [R, S, heads * 3 * D], overwritten; its entry [r, s] sits at position first_position + s of row r. table: from
    `rotary_table`. key_scratch, value_scratch: [rows >= R, heads, P, D]. Returns the queries [R, S, heads, D].
    """
    rows, length, _width = qkv.shape
    heads, head_size = key_scratch.shape[1], key_scratch.shape[3]
    end = first_position + length
    angles = table[first_position:end, None, None]
    query, key, value = _rotate(qkv.view(rows, length, heads, 3, head_size), angles)
    key_scratch[:rows, :, first_position:end].copy_(key.transpose(1, 2))
    value_scratch[:rows, :, first_position:end].copy_(value.transpose(1, 2))
    return query


def _rotate(qkv: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys of qkv [..., heads, 3, D] in place. angles: [..., 1, 1, rotary_dims]. Returns q, k, v."""
    rotary_dims = angles.shape[-1]
    cos, sin = angles.view(*angles.shape[:-1], 2, -1).unbind(-2)
    pairs = qkv.narrow(-2, 0, 2).narrow(-1, 0, rotary_dims)
    x, y = pairs.view(*pairs.shape[:-1], 2, -1).unbind(-2)
    x_rotated = torch.addcmul(x * cos, y, sin, value=-1)
    y.copy_(torch.addcmul(y * cos, x, sin))
    x.copy_(x_rotated)
    query, key, value = qkv.unbind(-2)
    return query, key, value


@jit
def load_rotated(
    qkv: tl.tensor,
    first: tl.tensor,
    factor: tl.tensor,
    missing_product: tl.tensor,
    bias: tl.tensor,
    angles: tl.tensor,
    dims: tl.tensor,
    inside: tl.tensor,
    ROTARY: tl.constexpr,
    LATE: tl.constexpr,
) -> tl.tensor:
    """Rotated heads [TILE_H, D] in fp32, whose entries `qkv` points at and whose columns begin at `first` [TILE_H, 1].

    `angles` points at the position's row. factor, missing_product, bias: for `load_normalised`, with LATE.
    """
    half: tl.constexpr = ROTARY // 2
    turned = dims < ROTARY
    cos = tl.load(angles + dims % half, mask=turned, other=1.0)
    sin = tl.load(angles + half + dims % half, mask=turned, other=0.0)
    lower = dims < half
    x = load_normalised(qkv, first + dims[None, :], factor, missing_product, bias, inside, LATE)
    partner = first + tl.where(lower, dims + half, dims - half)[None, :]
    y = load_normalised(qkv, partner, factor, missing_product, bias, inside & turned[None, :], LATE)
    return x * cos[None, :] + y * tl.where(lower, -sin, sin)[None, :]


@jit
def _store_heads(
    qkv: tl.tensor,
    angles: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    cache_heads: tl.tensor,
    qkv_stride: tl.tensor,
    entry: tl.tensor,
    heads: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_H: tl.constexpr,
) -> None:
    """Rotate and store some heads of one position; head h's place in the caches is the line h * `cache_heads`."""
    head = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    dims = tl.arange(0, HEAD_SIZE)
    inside = (head < heads)[:, None] & (dims < HEAD_SIZE)[None, :]
    source, first = qkv + entry * qkv_stride, head[:, None] * 3 * HEAD_SIZE
    to_query = (entry * heads + head)[:, None] * HEAD_SIZE + dims[None, :]
    to_cache = (head * cache_heads)[:, None] * HEAD_SIZE + dims[None, :]
    rotated = load_rotated(source, first, None, None, None, angles, dims, inside, ROTARY, False)
    tl.store(query + to_query, rotated.to(query.dtype.element_ty), mask=inside)
    first += HEAD_SIZE
    rotated = load_rotated(source, first, None, None, None, angles, dims, inside, ROTARY, False)
    tl.store(keys + to_cache, rotated.to(keys.dtype.element_ty), mask=inside)
    value = tl.load(source + first + HEAD_SIZE + dims[None, :], mask=inside)
    tl.store(values + to_cache, value, mask=inside)


@jit
def _write_paged(
    qkv: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    table: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    heads: tl.tensor,
    qkv_stride: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    TILE_H: tl.constexpr,
) -> None:
    """Some heads of one position, to its slot."""
    entry = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + entry)
    angles = table + tl.load(positions + entry).to(tl.int64) * ROTARY
    start = (slot // PAGE_SIZE * heads * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_SIZE
    keys, values = keys + start, values + start
    _store_heads(qkv, angles, query, keys, values, PAGE_SIZE, qkv_stride, entry, heads, HEAD_SIZE, ROTARY, TILE_H)


def triton_rotary_paged_write(
    qkv: Tensor, positions: Tensor, slots: Tensor, table: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """`rotary_paged_write` in Triton: x'_i = x_i cos - x_{i+half} sin, x'_{i+half} = x_{i+half} cos + x_i sin.

    A program rotates and stores some heads of one position. All but the rows of `qkv` contiguous; `qkv` is left as it
    is.
    """
    assert qkv.stride(1) == 1 and table.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
    _pages, heads, page_size, head_size = key_cache.shape
    query = qkv.new_empty(qkv.shape[0], heads, head_size)
    tile_h = _heads_of_a_program(heads, head_size)
    _write_paged[(qkv.shape[0], cdiv(heads, tile_h))](
        qkv,
        positions,
        slots,
        table,
        query,
        key_cache,
        value_cache,
        heads,
        qkv.stride(0),
        PAGE_SIZE=page_size,
        HEAD_SIZE=head_size,
        ROTARY=table.shape[1],
        TILE_H=tile_h,
        num_warps=2,
    )
    return query


def _heads_of_a_program(heads: int, head_size: int) -> int:
    return min(power_of_2(heads), 1024 // head_size)
