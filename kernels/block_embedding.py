"""The lookup embedder: a block's token vectors side by side (paper section 2.1)."""

import torch.nn.functional as F
from torch import Tensor

from kernels.jit import cdiv, jit, power_of_2, tl

MAX_TILE = 2048
"""Numbers that one program copies."""


def block_embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """Concatenate the vectors of each block's tokens, in order.

    out[n, j * E + e] = table[token_ids[n, j], e]

    token_ids: [N, L] int32 or int64. table: [V, E]. Returns [N, L * E] in the table's dtype.
    """
    return F.embedding(token_ids, table).flatten(1)


@jit
def _embed_tile(
    token_ids: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    TILE_L: tl.constexpr,
    TILE_E: tl.constexpr,
) -> None:
    """A part of the vectors of some of a block's tokens."""
    block = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * TILE_L + tl.arange(0, TILE_L)
    dims = tl.program_id(2) * TILE_E + tl.arange(0, TILE_E)
    tokens = tl.load(token_ids + block * length + places, mask=places < length, other=0).to(tl.int64)
    inside = (places < length)[:, None] & (dims < width)[None, :]
    vectors = tl.load(table + tokens[:, None] * width + dims[None, :], mask=inside)
    tl.store(out + (block * length + places)[:, None] * width + dims[None, :], vectors, mask=inside)


def triton_block_embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """`block_embedding` in Triton: out[n, j * E + e] = table[token_ids[n, j], e]. Both contiguous."""
    assert token_ids.is_contiguous() and table.is_contiguous()
    blocks, length = token_ids.shape
    width = table.shape[1]
    out = table.new_empty(blocks, length * width)
    tile_e = min(power_of_2(width), MAX_TILE)
    tile_l = min(power_of_2(length), MAX_TILE // tile_e)
    grid = (blocks, cdiv(length, tile_l), cdiv(width, tile_e))
    _embed_tile[grid](token_ids, table, out, length, width, TILE_L=tile_l, TILE_E=tile_e)
    return out
