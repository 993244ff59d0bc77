"""One request while the engine knows it: its tokens, its place in the batch, and how far it has come."""

from collections.abc import Hashable
from enum import Enum

from engine.alignment import AlignedPrompt
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
    FINISHED = "finished"
    """Gets nothing any more. Holds its row and pages as long as a step in flight may write them."""


class Sequence:
    """State of one request. The scheduler alone writes it; the runner reads it.

    Positions count blocks: those before `prefill_end` hold known blocks and are prefilled; each one from there to
    `end_position` is decoded and writes the block that follows it. What a sequence wrote before it was preempted is
    known as its prompt is.
    """

    __slots__ = (
        "arrival", "end_position", "first_scheduled", "forced", "generated", "in_flight", "key", "page_positions",
        "pages", "position", "prefill_end", "rank", "request", "row", "state", "stop_token_ids", "tokens",
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
        self.page_positions = 0
        """Positions that `pages` has room for."""

        self.tokens = list(prompt.tokens)
        """Whole blocks: the aligned prompt, then every committed block of a sequence that goes on."""
        self.forced = prompt.forced
        """How the next written block begins: nothing once the first one is committed."""
        self.generated = 0
        """Tokens committed as the answer. Forced tokens are not among them."""
        self.stop_token_ids = frozenset(params.stop_token_ids)

        self.position = 0
        """Positions scheduled so far, and so the next one to schedule."""
        self.prefill_end = len(prompt.tokens) // block_length - 1
        written_blocks = -(-(len(prompt.forced) + params.max_tokens) // block_length)
        self.end_position = self.prefill_end + written_blocks
        """No step goes past here: max_tokens are reached by then."""
        self.in_flight = 0
        """Prompt chunks and decodes of it that are scheduled and not committed."""
        self.first_scheduled: float | None = None

    @property
    def bound_row(self) -> int:
        """The row it holds. Raises ValueError where it has none."""
        if self.row is None:
            raise ValueError(f"sequence {self.key!r} holds no row")
        return self.row

    def __repr__(self) -> str:
        return (
            f"Sequence({self.key!r}, {self.state.value}, row={self.row}, position={self.position}/{self.end_position}, "
            f"generated={self.generated}/{self.request.params.max_tokens}, in_flight={self.in_flight})"
        )
