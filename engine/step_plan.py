"""What one step does: whose prompts it works on, who decodes, and what has to reach the device before it."""

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from engine.row_table import Float32, Int32, Int64, Rows
from engine.sequence import Sequence
from engine.types import MAX_LOGPROBS, TokenLogprobs


class PrefillChunk(NamedTuple):
    """Prompt blocks of one sequence to run through the block decoder, for their KV only."""

    sequence: Sequence
    start: int
    """First position."""
    length: int
    """Positions, at least one."""


class PageRun(NamedTuple):
    """The pages that a row begins with: the first entries of its page table."""

    row: int
    pages: list[int]


class BlockLogprobs(NamedTuple):
    """For each token of each row's block: its logprob [rows, L], and the likeliest [rows, L, MAX_LOGPROBS].

    Rows that did not ask have no meaningful ones; behind as many as a row asked for stand ids of -1.
    """

    chosen: Float32
    ids: Int32
    values: Float32

    @classmethod
    def of_shape(cls, shape: tuple[int, int]) -> "BlockLogprobs":
        """To be filled, for [rows, L]."""
        top = (*shape, MAX_LOGPROBS)
        return cls(np.zeros(shape, np.float32), np.full(top, -1, np.int32), np.zeros(top, np.float32))

    def of_row(self, row: int, start: int, end: int, top: int) -> tuple[TokenLogprobs, ...]:
        """Those of the tokens from `start` to before `end` of a row's block, with the `top` likeliest."""
        chosen, ids = self.chosen[row, start:end].tolist(), self.ids[row, start:end, :top].tolist()
        values = self.values[row, start:end, :top].tolist()
        # A vocabulary may have fewer than were asked for.
        told = [sum(one >= 0 for one in line) for line in ids]
        return tuple(
            TokenLogprobs(logprob, tuple(some[:number]), tuple(their[:number]))
            for logprob, some, their, number in zip(chosen, ids, values, told, strict=True)
        )


def _no_positions() -> Int32:
    return np.empty(0, np.int32)


def _no_entries() -> Int64:
    return np.empty((0, 3), np.int64)


def _no_rows() -> Rows:
    return np.empty(0, np.intp)


@dataclass(eq=False)
class StepPlan:
    """What one step does. The runner prefills before it decodes, so a row may do both in one step."""

    number: int = 0
    """Steps are counted from 1."""
    bound: list[Sequence] = field(default_factory=list)
    """Sequences that get their row in this step: their state has to reach the device before it."""
    page_runs: list[PageRun] = field(default_factory=list)
    """Of prompts."""
    grown: Int64 = field(default_factory=_no_entries)
    """Of rows that decode, a page each: row, place in its table, page [rows, 3]."""
    prefill: list[PrefillChunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    """Sequences whose row gains a block."""
    rows: Rows = field(default_factory=_no_rows)
    """The rows of `decode`."""
    decode_positions: Int32 = field(default_factory=_no_positions)
    """For each of `decode`, the position it decodes."""

    adjusted: bool = False
    """Whether one of `decode` asks for bias, penalties or logprobs."""

    @property
    def page_entries(self) -> Int64:
        """New page table entries [entries, 3]: row, index, page."""
        runs = self.page_runs
        if not runs:
            return self.grown
        rows, lengths = np.array([(run.row, len(run.pages)) for run in runs], np.int64).T
        entries = np.empty((lengths.sum(), 3), np.int64)
        entries[:, 0] = rows.repeat(lengths)
        entries[:, 1] = np.arange(len(entries)) - (lengths.cumsum() - lengths).repeat(lengths)
        entries[:, 2] = np.fromiter(chain.from_iterable(run.pages for run in runs), np.int64, len(entries))
        return np.concatenate((self.grown, entries))

    @property
    def positions(self) -> int:
        """Positions the step works on."""
        return len(self.decode) + sum(chunk.length for chunk in self.prefill)

    @property
    def request_ids(self) -> list[int]:
        """Ids of the requests that the step works on, each once."""
        sequences = chain((chunk.sequence for chunk in self.prefill), self.decode)
        return sorted({sequence.request.request_id for sequence in sequences})
