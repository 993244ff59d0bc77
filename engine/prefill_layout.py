"""The chunks of a prefill as the arrays that the device reads."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from engine.row_table import Int32
from engine.step_plan import PrefillChunk

ALIGNMENT = 4
"""Columns: Triton compiles anew for lines of a table that do not begin at a multiple of 16 bytes."""


@dataclass(frozen=True)
class PrefillLayout:
    """Prompt blocks, one chunk's behind the other's, and the table that says whose they are."""

    blocks: Int32
    """[N, L] token ids."""
    table: Int32
    """[3, C]: of each chunk its row, its first position, and the first of its entries in `blocks`.

    At least the last column is padding: an empty chunk of the padding row behind all entries.
    """

    @classmethod
    def of(cls, chunks: Seq[PrefillChunk], padding_row: int) -> "PrefillLayout":
        """The layout of at least one chunk."""
        blocks = np.concatenate(
            [chunk.sequence.blocks[chunk.start : chunk.start + chunk.length] for chunk in chunks], dtype=np.int32
        )
        rows = [chunk.sequence.bound_row for chunk in chunks]
        starts, lengths = [chunk.start for chunk in chunks], [chunk.length for chunk in chunks]
        return cls(blocks, chunk_table(rows, starts, lengths, padding_row))

    def widened(self, columns: int) -> Int32:
        """The table with padding up to so many columns, at least as many as it has."""
        wide = np.repeat(self.table[:, -1:], columns, axis=1)
        wide[:, : self.table.shape[1]] = self.table
        return wide


def chunk_table(rows: Seq[int], starts: Seq[int], lengths: Seq[int], padding_row: int) -> Int32:
    """The table of chunks of so many positions, at least one each: of these rows, from these positions on."""
    chunks, ends = len(rows), np.cumsum(lengths)
    table = padding_table(-(-(chunks + 1) // ALIGNMENT) * ALIGNMENT, padding_row, int(ends[-1]))
    table[:, :chunks] = rows, starts, [0, *ends[:-1]]
    return table


def padding_table(columns: int, padding_row: int, entries: int = 0) -> Int32:
    """A table [3, columns] of no chunk but padding, which begins behind so many entries."""
    table = np.zeros((3, columns), np.int32)
    table[0], table[2] = padding_row, entries
    return table
