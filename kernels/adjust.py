"""Bias and penalties: what a request asks its logits to be before a token is chosen.

z = logit + bias
z = z / repetition where z > 0, else z * repetition     for tokens of the prompt or of the answer so far
z = z - presence                                        for tokens of the answer so far
z = z - frequency * how often the answer has the token
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jit import cdiv, jit, power_of_2, tl

IN_PROMPT = 1 << 30
"""Added to the count of a token that the prompt holds."""
TILE_V = 1024
WARPS = 4


@dataclass(frozen=True)
class AdjustmentTables:
    """How rows adjust their logits. Rows that ask for something have a slot; slot 0 is all others', and neutral."""

    slot: Tensor
    """[rows] int32."""
    repetition: Tensor
    """[slots] fp32, above 0; 1 is off."""
    presence: Tensor
    """[slots] fp32; 0 is off."""
    frequency: Tensor
    """[slots] fp32; 0 is off."""
    counts: Tensor
    """[slots, V] int32: how often the answer has each token, plus IN_PROMPT."""
    bias_ids: Tensor
    """[slots, K] int32; -1 behind the last."""
    bias_values: Tensor
    """[slots, K] fp32."""
    bias_length: Tensor
    """[slots] int32."""


def adjust(logits: Tensor, row_index: Tensor, block: Tensor, tables: AdjustmentTables) -> Tensor:
    """Adjusted logits [R, V] fp32, by the formula above.

    logits: [R, V], any float dtype. row_index: [R] int32 into the tables. block: [R, W] int32, tokens that the answer
    has besides those that are counted in the tables, or -1.
    """
    slots = tables.slot.index_select(0, row_index).long()
    ids, values = tables.bias_ids[slots], tables.bias_values[slots]
    adjusted = logits.float().scatter_add(1, ids.clamp(min=0).long(), values.masked_fill(ids < 0, 0))
    counts = tables.counts[slots].scatter_add(1, block.clamp(min=0).long(), (block >= 0).int())
    repetition = tables.repetition[slots][:, None]
    repeated = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    adjusted = torch.where(counts > 0, repeated, adjusted)
    counts = counts & (IN_PROMPT - 1)
    adjusted = adjusted - torch.where(counts > 0, tables.presence[slots][:, None], 0.0)
    return adjusted - tables.frequency[slots][:, None] * counts


@jit
def _adjust(
    logits: tl.tensor,
    row_index: tl.tensor,
    block: tl.tensor,
    slots: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
    counts: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    bias_lengths: tl.tensor,
    adjusted: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    bias_width: tl.tensor,
    tiles: tl.tensor,
    WIDTH: tl.constexpr,
    IN_PROMPT: tl.constexpr,
    TILE_V: tl.constexpr,
) -> None:
    """One tile of one row's tokens."""
    entry, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    slot = tl.load(slots + tl.load(row_index + entry)).to(tl.int64)
    tokens = tile * TILE_V + tl.arange(0, TILE_V)
    wanted = tokens < vocab_size
    score = tl.load(logits + entry * stride + tokens, mask=wanted, other=0).to(tl.float32)
    if slot > 0:
        for place in range(tl.load(bias_lengths + slot)):
            biased = tokens == tl.load(bias_ids + slot * bias_width + place)
            score += tl.where(biased, tl.load(bias_values + slot * bias_width + place), 0.0)
        count = tl.load(counts + slot * vocab_size + tokens, mask=wanted, other=0)
        for place in tl.static_range(WIDTH):
            count += (tokens == tl.load(block + entry * WIDTH + place)).to(tl.int32)
        repetition = tl.load(repetitions + slot)
        repeated = tl.where(score > 0, tl.div_rn(score, repetition), score * repetition)
        score = tl.where(count > 0, repeated, score)
        count = count & (IN_PROMPT - 1)
        score -= tl.where(count > 0, tl.load(presences + slot), 0.0)
        score -= tl.load(frequencies + slot) * count.to(tl.float32)
    tl.store(adjusted + entry * vocab_size + tokens, score, mask=wanted)


def triton_adjust(logits: Tensor, row_index: Tensor, block: Tensor, tables: AdjustmentTables) -> Tensor:
    """`adjust` in Triton: rows without a slot are copied."""
    assert logits.stride(1) == 1
    assert block.is_contiguous() and all(table.is_contiguous() for table in vars(tables).values())
    rows, vocab_size = logits.shape
    adjusted = torch.empty(rows, vocab_size, dtype=torch.float32, device=logits.device)
    tile = min(power_of_2(vocab_size), TILE_V)
    tiles = cdiv(vocab_size, tile)
    _adjust[(rows * tiles,)](
        logits,
        row_index,
        block,
        *vars(tables).values(),
        adjusted,
        logits.stride(0),
        vocab_size,
        tables.bias_ids.shape[1],
        tiles,
        WIDTH=block.shape[1],
        IN_PROMPT=IN_PROMPT,
        TILE_V=tile,
        num_warps=WARPS,
    )
    return adjusted
