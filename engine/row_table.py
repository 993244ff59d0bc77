"""What changes with every step of the sequences that hold rows: an array each, addressed by row.

A batch has thousands of rows and hardly any of them begins or ends in a step, so a step's work on them is done for all
at once; `engine.scheduler` looks only at the others one by one.
"""

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_BLOCKS = 64
"""Blocks a row has room for at first; doubled whenever a sequence comes that may have more."""

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Rows = NDArray[np.intp]
"""Rows as numpy indexes by them: other integers would be converted each time."""
Float32 = NDArray[np.float32]
Flags = NDArray[np.bool_]


class RowTable:
    """One entry a row. Entries of free rows mean nothing, but for the flags, which are False."""

    def __init__(self, max_rows: int, block_length: int) -> None:
        def zeros() -> Int32:
            return np.zeros(max_rows, np.int32)

        self.sequences: NDArray[Any] = np.full(max_rows, None, object)
        """Who holds the row; None where it is free."""
        self.position = zeros()
        """Positions scheduled so far, and so the next one to schedule."""
        self.end_position = zeros()
        """No step goes past here."""
        self.page_positions = zeros()
        """Positions that the row's pages have room for."""
        self.generated = zeros()
        """Tokens committed as the answer."""
        self.max_tokens = zeros()
        self.in_flight = zeros()
        """Prompt chunks and decodes that are scheduled and not committed."""
        self.known = zeros()
        """Blocks that are known: the prompt's, and those that were committed."""
        self.blocks = np.zeros((max_rows, FIRST_BLOCKS, block_length), np.int32)
        """Token ids of the known blocks [rows, blocks, L]; what lies behind them means nothing."""
        self.decoding: Flags = np.zeros(max_rows, bool)
        """Whose prompt is scheduled, and who has positions left to schedule."""
        self.open: Flags = np.zeros(max_rows, bool)
        """Who gets what its row writes: all that have not finished."""
        self.leaving: Flags = np.zeros(max_rows, bool)
        """Who gives back the row once no step in flight includes it."""
        self.has_stops: Flags = np.zeros(max_rows, bool)
        """Who may end at other tokens than end-of-text."""
        self.wants_logprobs: Flags = np.zeros(max_rows, bool)
        """Who is told the logprobs of its tokens."""
        self.adjusted: Flags = np.zeros(max_rows, bool)
        """Whose steps have to be adjusted ones: for bias, penalties or logprobs."""

    def place(
        self,
        row: int,
        sequence: object,
        known: Int32,
        *,
        end_position: int,
        generated: int,
        max_tokens: int,
        has_stops: bool,
        wants_logprobs: bool,
        adjusted: bool,
    ) -> None:
        """Give the row to a sequence whose blocks [N, L] are known. It has neither pages nor positions yet."""
        if end_position >= self.blocks.shape[1]:
            self._make_room(end_position + 1)
        self.sequences[row] = sequence
        self.position[row] = self.page_positions[row] = self.in_flight[row] = 0
        self.end_position[row] = end_position
        self.generated[row] = generated
        self.max_tokens[row] = max_tokens
        self.known[row] = len(known)
        self.blocks[row, : len(known)] = known
        self.decoding[row] = self.leaving[row] = False
        self.open[row] = True
        self.has_stops[row] = has_stops
        self.wants_logprobs[row] = wants_logprobs
        self.adjusted[row] = adjusted

    def clear(self, row: int) -> None:
        """Nobody holds the row any more."""
        self.sequences[row] = None
        self.decoding[row] = self.open[row] = self.leaving[row] = False

    def takes_whole(self, rows: Rows, blocks: Int32, finite: Flags, eos_token_id: int) -> Flags:
        """Which of the rows take their block [L] of blocks [N, L] as it is, and go on, having had tokens before.

        They are nearly all: the others begin, end or fail here, or may, or are to have more than tokens.
        """
        generated = self.generated[rows]
        goes_on: Flags = finite & (generated > 0) & (generated + blocks.shape[1] < self.max_tokens[rows])
        plain: Flags = ~(self.has_stops[rows] | self.wants_logprobs[rows])
        whole: Flags = goes_on & plain & self.open[rows]
        ends = blocks == eos_token_id
        # Hardly ever, and a look at every row is a third of a commit.
        if ends.any():
            whole &= ~ends.any(axis=1)
        return whole

    def append(self, rows: Rows, blocks: Int32, generated: int | Seq[int]) -> None:
        """Each of the rows knows its block of blocks [N, L], of which so many tokens are the answer's."""
        self.blocks[rows, self.known[rows]] = blocks
        self.known[rows] += 1
        self.generated[rows] += generated

    def known_blocks(self, row: int) -> Int32:
        """The row's known blocks [N, L]; a view that the next `place` may leave behind."""
        known: Int32 = self.blocks[row, : self.known[row]]
        return known

    def _make_room(self, blocks: int) -> None:
        rows, room, length = self.blocks.shape
        while room < blocks:
            room *= 2
        # Untouched memory of zeros costs nothing: what no row ever reaches is not there.
        larger = np.zeros((rows, room, length), np.int32)
        larger[:, : self.blocks.shape[1]] = self.blocks
        self.blocks = larger
