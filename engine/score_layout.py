"""How a text is laid out to be scored: every token but the first gets its logprob, whatever the model is."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import ModelConfig


class ScoreLayout(NamedTuple):
    """A text as the model gets it."""

    blocks: NDArray[np.int32]
    """[N, L]. The first one is not predicted; the last one may have zeros behind the text."""
    first: int
    """Where the text's second token stands in blocks 1 and on, which are predicted, laid one behind the other."""

    @property
    def positions(self) -> int:
        """Positions to compute: each predicts the block behind it."""
        return len(self.blocks) - 1


def lay_out_text(token_ids: NDArray[np.int32], model: ModelConfig) -> ScoreLayout:
    """Pads in front, all but one of a block, where the model was trained with padding, so that block 0 has one token.

    Models that were not get a block of end-of-text in front, which says nothing of the first token either. A block of
    one token, as vanilla models have, needs neither.
    """
    length = model.block_length
    filler = model.pad_token_id if model.prompt_alignment == "left_pad" else model.eos_token_id
    front = np.full(_tokens_in_front(model), filler, np.int32)
    behind = np.zeros(-(len(front) + len(token_ids)) % length, np.int32)
    blocks = np.concatenate((front, token_ids, behind)).reshape(-1, length)
    return ScoreLayout(blocks, len(front) + 1 - length)


def longest_text(model: ModelConfig) -> int:
    """Tokens of the longest text that can be scored: its last block has no position, as nothing follows it."""
    return (model.max_positions + 1) * model.block_length - _tokens_in_front(model)


def window_length(model: ModelConfig) -> int:
    """Tokens that longer texts are cut to: with what stands in front they are the model's length."""
    return model.max_length - _tokens_in_front(model)


def _tokens_in_front(model: ModelConfig) -> int:
    length = model.block_length
    return length - 1 if model.prompt_alignment == "left_pad" or length == 1 else length
