"""How a text is laid out to be scored: every token but the first gets its logprob, whatever the model is."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import ModelConfig


class ScoreLayout(NamedTuple):
    """A text as the model gets it."""

    blocks: NDArray[np.int32]
    """[N, L]. The first one is not predicted; the last one may have zeros behind the text."""
    skipped: int
    """Tokens at the text's head that get no number."""
    first: int
    """Where the next token stands in blocks 1 and on, which are predicted, laid one behind the other."""

    @property
    def positions(self) -> int:
        """Positions to compute: each predicts the block behind it."""
        return len(self.blocks) - 1


def lay_out_text(token_ids: NDArray[np.int32], model: ModelConfig, padding: int | None = None) -> ScoreLayout:
    """Pads in front, all but one of a block, where the model was trained with padding, so that block 0 has one token.

    Models that were not get a block of end-of-text in front, which says nothing of the first token either. A block of
    one token, as vanilla models have, needs neither. `padding` is another number of pads, whatever the model.
    """
    length, front = model.block_length, _tokens_in_front(model, padding)
    pads = padding is not None or model.prompt_alignment == "left_pad"
    filler = np.full(front, model.pad_token_id if pads else model.eos_token_id, np.int32)
    behind = np.zeros(-(front + len(token_ids)) % length, np.int32)
    blocks = np.concatenate((filler, token_ids, behind)).reshape(-1, length)
    skipped = max(1, length - front)
    return ScoreLayout(blocks, skipped, front + skipped - length)


def longest_text(model: ModelConfig, padding: int | None = None) -> int:
    """Tokens of the longest text that can be scored: its last block has no position, as nothing follows it."""
    return (model.max_positions + 1) * model.block_length - _tokens_in_front(model, padding)


def window_length(model: ModelConfig, padding: int | None = None) -> int:
    """Tokens that longer texts are cut to: with what stands in front they are the model's length."""
    return model.max_length - _tokens_in_front(model, padding)


def _tokens_in_front(model: ModelConfig, padding: int | None) -> int:
    if padding is not None:
        return padding
    length = model.block_length
    return length - 1 if model.prompt_alignment == "left_pad" or length == 1 else length
