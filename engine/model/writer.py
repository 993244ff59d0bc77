"""What writes a block from the block decoder's output: the interface that engine and models agree on.

Letters in shapes: R rows, L block length, H block decoder width, V vocabulary, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Choose = Callable[[Tensor, int], Tensor]
"""(logits [R, V], place in the block) -> tokens [R]."""


@dataclass(frozen=True)
class Scratch:
    """Keys and values of blocks being written, [layers, rows, heads, positions, D] each; every step overwrites them."""

    keys: Tensor
    values: Tensor


class Writer(Protocol):
    """Turns the block decoder's output at a position into the next position's tokens. Never waits for the device."""

    def new_scratch(self, rows: int) -> Scratch:
        """The cache that `write_block` needs for `rows` rows."""

    def write_block(self, context: Tensor, scratch: Scratch, choose: Choose) -> Tensor:
        """Write a block for each row of `context` [R, H]; the scratch has R rows at least.

        `choose` takes the logits of each place in turn, and what it returns is fed back. Returns the tokens [R, L].
        """
