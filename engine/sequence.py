"""One request while the engine knows it: its tokens, its place in the batch, and how far it has come."""

from collections.abc import Hashable
from enum import Enum

from engine.alignment import AlignedPrompt
from engine.row_table import Int32, RowTable
from engine.types import GenerationRequest


class SequenceState(Enum):
    """Where a sequence is between its arrival and its end. Only the scheduler changes it."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    """Holds a row; prompt positions are still to be scheduled."""
    DECODING = "decoding"
    """Holds a row; all prompt positions are scheduled, and it gains a block in each step that has a page for it."""
    PREEMPTED = "preempted"
    """Is to wait again. Holds its row and pages as long as a step in flight may write them."""
    SPOILED = "spoiled"
    """As PREEMPTED, but gains nothing from the steps in flight: they read shared pages that were never written."""
    FINISHED = "finished"
    """Gets nothing any more. Holds its row and pages as long as a step in flight may write them."""


class Sequence:
    """State of one request. The scheduler alone writes it; the runner reads it.

    Positions count blocks: those before `prefill_end` hold known blocks and are prefilled; each one from there to
    `end_position` is decoded and writes the block that follows it. What a sequence wrote before it was preempted is
    known as its prompt is. While it holds a row, what changes from step to step is the row table's.
    """

    __slots__ = (
        "_blocks", "_generated", "_table", "arrival", "cached_tokens", "end_position", "first_scheduled", "forced",
        "key", "padding", "page_contents", "page_keys", "pages", "prefill_end", "rank", "request", "row", "state",
        "stop_token_ids",
    )  # fmt: skip

    def __init__(
        self, *, key: Hashable, request: GenerationRequest, prompt: AlignedPrompt, arrival: float, block_length: int
    ) -> None:
        params = request.params
        self.key = key
        """Whom the scheduler's caller calls it by; unique among the sequences that are not finished."""
        self.request = request
        self.arrival = arrival
        self.rank = (request.priority, 0)
        """Priority, then order of arrival, which the queue gives: the smaller, the earlier its turn."""
        self.state = SequenceState.WAITING
        self.row: int | None = None
        self.pages: list[int] = []
        """In the order of the page table: page i holds positions i x page_size and on."""
        self.page_keys: list[bytes] = []
        """The prefix cache's keys of the whole pages before `prefill_end`, as far as they are known."""
        self.page_contents: list[bytes] = []
        """What these keys were made from, beside one another."""
        self.padding = prompt.padding
        """Pad ids at the head of the first block."""
        self.cached_tokens = 0
        """Prompt tokens that the prefix cache held when it was first admitted."""
        self.forced = prompt.forced
        """How the next written block begins: nothing once the first one is committed."""
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.prefill_end = len(prompt.blocks) - 1
        written_blocks = -(-(len(prompt.forced) + params.max_tokens) // block_length)
        self.end_position = self.prefill_end + written_blocks
        """No step goes past here: max_tokens are reached by then."""
        self.first_scheduled: float | None = None
        self._blocks = prompt.blocks
        self._generated = 0
        self._table: RowTable | None = None

    @property
    def bound_row(self) -> int:
        """The row it holds. Raises ValueError where it has none."""
        if self.row is None:
            raise ValueError(f"sequence {self.key!r} holds no row")
        return self.row

    @property
    def position(self) -> int:
        """Positions scheduled so far, and so the next one to schedule."""
        return 0 if self._table is None else int(self._table.position[self.bound_row])

    @property
    def page_positions(self) -> int:
        """Positions that `pages` has room for."""
        return 0 if self._table is None else int(self._table.page_positions[self.bound_row])

    @property
    def in_flight(self) -> int:
        """Prompt chunks and decodes of it that are scheduled and not committed."""
        return 0 if self._table is None else int(self._table.in_flight[self.bound_row])

    @property
    def generated(self) -> int:
        """Tokens committed as the answer. Forced tokens are not among them."""
        return self._generated if self._table is None else int(self._table.generated[self.bound_row])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the request's prompt."""
        return len(self.request.prompt) // self._blocks.itemsize

    @property
    def blocks(self) -> Int32:
        """Known blocks [N, L]: the aligned prompt, then every committed block of a sequence that goes on."""
        return self._blocks if self._table is None else self._table.known_blocks(self.bound_row)

    def take_row(self, row: int, table: RowTable) -> None:
        """Hold the row from now on."""
        params = self.request.params
        wants_logprobs = params.logprobs is not None
        table.place(
            row,
            self,
            self._blocks,
            end_position=self.end_position,
            generated=self._generated,
            max_tokens=params.max_tokens,
            has_stops=bool(self.stop_token_ids),
            wants_logprobs=wants_logprobs,
            adjusted=wants_logprobs or params.adjusts,
        )
        self.row, self._table = row, table

    def leave_row(self) -> int:
        """Give the row back, and keep what is known by then: not its blocks, if it has finished. Returns the row."""
        row, table = self.bound_row, self._table
        assert table is not None
        if self.state is not SequenceState.FINISHED:
            self._blocks = self.blocks.copy()
        self._generated = self.generated
        self.row, self._table, self.pages = None, None, []
        table.clear(row)
        return row

    def __repr__(self) -> str:
        return (
            f"Sequence({self.key!r}, {self.state.value}, row={self.row}, position={self.position}/{self.end_position}, "
            f"generated={self.generated}/{self.request.params.max_tokens}, in_flight={self.in_flight})"
        )
