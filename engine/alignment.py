"""How a prompt of any length becomes whole blocks: padding in front, or its last tokens forced.

The first block of a sequence is never predicted, so a sequence has to start with a full one.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engine.config import PromptAlignment


class AlignedPrompt(NamedTuple):
    """A prompt as the model gets it."""

    tokens: tuple[int, ...]
    """Whole blocks, at least one: padding first, then the prompt without its forced tail."""
    forced: tuple[int, ...]
    """The prompt's last tokens, fewer than a block: the first block that is written begins with them."""
    padding: int
    """Pad ids at the head of `tokens`."""


def align_prompt(
    token_ids: Sequence[int], block_length: int, alignment: PromptAlignment, pad_token_id: int
) -> AlignedPrompt:
    """Align a prompt to blocks of `block_length` tokens.

    "left_pad" completes the first block with pad ids. "forced_tail" begins blocks at the prompt's first token and
    leaves what does not fill a block to the token decoder; a prompt shorter than a block has no block to condition on
    then, and is padded instead. Raises ValueError for an empty prompt.
    """
    if not token_ids:
        raise ValueError("a prompt of no tokens cannot be aligned")
    tail = len(token_ids) % block_length
    if alignment == "forced_tail" and len(token_ids) >= block_length:
        cut = len(token_ids) - tail
        return AlignedPrompt(tuple(token_ids[:cut]), tuple(token_ids[cut:]), 0)
    padding = -len(token_ids) % block_length
    return AlignedPrompt((pad_token_id,) * padding + tuple(token_ids), (), padding)
