"""How a prompt of any length becomes whole blocks: padding in front, or its last tokens forced.

The first block of a sequence is never predicted, so a sequence has to start with a full one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import PromptAlignment


class AlignedPrompt(NamedTuple):
    """A prompt as the model gets it."""

    blocks: NDArray[np.int32]
    """[N, L], N at least 1: padding first, then the prompt without its forced tail."""
    forced: tuple[int, ...]
    """The prompt's last tokens, fewer than a block: the first block that is written begins with them."""
    padding: int
    """Pad ids at the head of the first block."""


def align_prompt(
    token_ids: Sequence[int] | NDArray[np.int32], block_length: int, alignment: PromptAlignment, pad_token_id: int
) -> AlignedPrompt:
    """Align a prompt to blocks of `block_length` tokens.

    "left_pad" completes the first block with pad ids. "forced_tail" begins blocks at the prompt's first token and
    leaves what does not fill a block to the token decoder; a prompt shorter than a block has no block to condition on
    then, and is padded instead. Raises ValueError for an empty prompt.
    """
    tokens = np.asarray(token_ids, np.int32)
    if not len(tokens):
        raise ValueError("a prompt of no tokens cannot be aligned")
    tail = len(tokens) % block_length
    if alignment == "forced_tail" and len(tokens) >= block_length:
        cut = len(tokens) - tail
        return AlignedPrompt(tokens[:cut].reshape(-1, block_length), tuple(tokens[cut:].tolist()), 0)
    padding = -len(tokens) % block_length
    if padding:
        tokens = np.concatenate((np.full(padding, pad_token_id, np.int32), tokens))
    return AlignedPrompt(tokens.reshape(-1, block_length), (), padding)
