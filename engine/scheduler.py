"""Who gets a row, pages and a part of the next step, and what a step's tokens mean for each request.

`schedule` plans a step, `commit` takes its result; both are plain Python on integers. A step may be planned before the
one ahead of it is committed: a decoding row gains exactly one position a step, so pages and length finishes are known
without its tokens. Only EOS, stop tokens, errors and aborts lag; a sequence they end while a step that includes it is
in flight keeps its row and pages until that step is committed, and gains nothing from it.
"""

from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from engine.admission import AdmissionRule, Occupancy, may_admit
from engine.finish import cut_answer
from engine.page_pool import PagePool
from engine.sequence import Sequence, SequenceState
from engine.types import Delta, InvalidRequestError, Timing
from engine.waiting_queue import WaitingQueue

NON_FINITE_ERROR = "the model produced non-finite logits for this request, so no token could be chosen"
OUT_OF_MEMORY_ERROR = "the device ran out of memory for this request; try again later, or with a shorter prompt"


class QueueFullError(Exception):
    """As many requests wait as may wait. Trying again later can succeed."""


class PrefillChunk(NamedTuple):
    """Prompt blocks of one sequence to run through the block decoder, for their KV only."""

    sequence: Sequence
    start: int
    """First position."""
    length: int
    """Positions, at least one."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What one step does. The runner prefills before it decodes, so a row may do both in one step."""

    number: int = 0
    """Steps are counted from 1."""
    bound: list[Sequence] = field(default_factory=list)
    """Sequences that get their row in this step: their state has to reach the device before it."""
    page_entries: list[tuple[int, int, int]] = field(default_factory=list)
    """New page table entries: row, index, page."""
    prefill: list[PrefillChunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    """Sequences whose row gains a block."""
    decode_positions: list[int] = field(default_factory=list)
    """For each of `decode`, the position it decodes."""

    @property
    def positions(self) -> int:
        """Positions the step works on."""
        return len(self.decode) + sum(chunk.length for chunk in self.prefill)

    @property
    def request_ids(self) -> list[int]:
        """Ids of the requests that the step works on, each once."""
        sequences = chain((chunk.sequence for chunk in self.prefill), self.decode)
        return sorted({sequence.request.request_id for sequence in sequences})


class Scheduler:
    """Rows, pages and the queue of one engine.

    `max_step_positions` has to exceed `max_rows`, so that a full batch of decoding rows still leaves room for prompts.
    An `admission` rule has to admit whatever the pool can hold when nothing runs, and never more pages than are free.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        max_rows: int,
        max_waiting: int,
        page_size: int,
        max_step_positions: int,
        block_length: int,
        eos_token_id: int,
        admission: AdmissionRule = may_admit,
    ) -> None:
        if max_step_positions <= max_rows:
            raise ValueError(f"max_step_positions {max_step_positions} has to exceed max_rows {max_rows}")
        self._pool = pool
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._page_size = page_size
        self._max_step_positions = max_step_positions
        self._block_length = block_length
        self._eos_token_id = eos_token_id
        self._admission = admission
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._rows: list[Sequence | None] = [None] * max_rows
        self._worst_pages = 0
        self._waiting = WaitingQueue()
        self._open: dict[Hashable, Sequence] = {}
        # One at most: the next prompt is begun only with budget that the one before it has left.
        self._prefilling: Sequence | None = None
        # A dict for its order and for removal without a search; the values mean nothing.
        self._decoding: dict[Sequence, None] = {}
        self._steps: deque[StepPlan] = deque()
        self._planned = 0
        self._preemptions = 0

    @property
    def running(self) -> int:
        """Sequences that hold a row."""
        return self._max_rows - len(self._free_rows)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        return len(self._waiting)

    @property
    def preemptions(self) -> int:
        """How often a sequence was sent back to wait, ever."""
        return self._preemptions

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or holds a row. While one does, a step can be scheduled or one is in flight."""
        return bool(self.running or self.waiting)

    def add(self, sequences: Seq[Sequence]) -> None:
        """Queue all of these sequences, or none.

        A sequence that a free row awaits does not count as waiting. Raises QueueFullError, or InvalidRequestError for
        a key that is taken and for a request that the whole page pool could not hold.
        """
        if self.waiting + len(sequences) > self._max_waiting + len(self._free_rows):
            raise QueueFullError(f"{self.waiting} requests wait already, and at most {self._max_waiting} may")
        keys = {sequence.key for sequence in sequences}
        if len(keys) < len(sequences) or not self._open.keys().isdisjoint(keys):
            raise InvalidRequestError("request_id", "a request with this id is open already")
        for sequence in sequences:
            pages = self._pages_for(sequence.end_position)
            if pages > self._pool.capacity:
                raise InvalidRequestError(
                    "max_tokens",
                    f"prompt and max_tokens need {pages} pages of KV cache, and the engine has {self._pool.capacity}",
                )
        for sequence in sequences:
            self._open[sequence.key] = sequence
            self._waiting.push(sequence)

    def abort(self, key: Hashable) -> bool:
        """End a sequence without a delta. False where no unfinished sequence has this key."""
        sequence = self._open.get(key)
        if sequence is None:
            return False
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        self._finish(sequence)
        return True

    def state_of(self, key: Hashable) -> SequenceState | None:
        """The state of an unfinished sequence; None where no such sequence has this key."""
        sequence = self._open.get(key)
        return None if sequence is None else sequence.state

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step, or None where there is nothing to do before a commit or an arrival.

        `now` is in seconds of the clock that arrivals were taken from. Steps have to be committed in this order.
        """
        plan = StepPlan(self._planned + 1)
        self._plan_decodes(plan)
        budget = self._max_step_positions - len(plan.decode)
        if self._prefilling is not None:
            budget -= self._plan_prompt(plan, self._prefilling, budget)
        while budget and (admitted := self._admit(plan, now)) is not None:
            budget -= self._plan_prompt(plan, admitted, budget)
        if not plan.decode and not plan.prefill:
            return None
        self._planned += 1
        self._steps.append(plan)
        return plan

    def commit(
        self,
        plan: StepPlan,
        tokens: Seq[Seq[int]],
        finite: Seq[bool],
        now: float,
        failed: Collection[Sequence] = (),
    ) -> list[tuple[Sequence, Delta]]:
        """Take the result of the oldest step in flight: what it added to each sequence that was not finished.

        `tokens` and `finite` go with `plan.decode`: a whole block, forced tokens included, and whether its logits were
        finite. The device had no memory for what `failed` names, sequences of the plan: they end here, and their tokens
        are not looked at. Raises ValueError for another plan or other lengths, before anything is changed.
        """
        if not self._steps or self._steps[0] is not plan:
            raise ValueError("steps have to be committed once each, in the order they were scheduled")
        if not len(plan.decode) == len(tokens) == len(finite):
            raise ValueError(f"{len(plan.decode)} rows decoded, but {len(tokens)} blocks and {len(finite)} flags came")
        self._steps.popleft()
        results = [
            (sequence, self._fail(sequence, OUT_OF_MEMORY_ERROR))
            for sequence in failed
            if sequence.state is not SequenceState.FINISHED
        ]
        for chunk in plan.prefill:
            self._land(chunk.sequence)
        for sequence, block, good in zip(plan.decode, tokens, finite, strict=True):
            if sequence.state is not SequenceState.FINISHED:
                results.append((sequence, self._commit_block(sequence, block, good, now)))
            self._land(sequence)
        return results

    def check_integrity(self) -> None:
        """Raises AssertionError where rows, pages, states or the queue contradict one another. Costs O(everything)."""
        running = [sequence for sequence in self._rows if sequence is not None]
        for row, sequence in enumerate(self._rows):
            assert (sequence is None) == (row in self._free_rows), f"row {row} is both free and taken, or neither"
            assert sequence is None or sequence.row == row, f"{sequence} sits in row {row}"
        assert len(set(self._free_rows)) == len(self._free_rows), "a row is free twice"
        self._pool.check_integrity(sequence.pages for sequence in running)
        worst_pages = sum(self._pages_for(sequence.end_position) for sequence in running)
        assert self._worst_pages == worst_pages, f"rows are taken to need {self._worst_pages} pages, not {worst_pages}"
        flying = Counter(chunk.sequence for plan in self._steps for chunk in plan.prefill)
        flying.update(sequence for plan in self._steps for sequence in plan.decode)
        for sequence in running:
            self._check_running(sequence, flying[sequence])
        assert flying.keys() <= set(running), "a step in flight includes a sequence that has lost its row"
        self._waiting.check_integrity()
        waiting = [sequence for sequence in self._open.values() if sequence.state is SequenceState.WAITING]
        assert len(waiting) == self.waiting, "waiting sequences are missing from the queue"
        assert all(s.row is None and not s.pages and not s.position for s in waiting), (
            "a waiting sequence holds something"
        )
        unfinished = {sequence for sequence in running if sequence.state is not SequenceState.FINISHED}
        assert unfinished | set(waiting) == set(self._open.values()), "open sequences neither wait nor run"
        assert all(key == sequence.key for key, sequence in self._open.items()), "a sequence is open under another key"
        prefilling = [sequence for sequence in running if sequence.state is SequenceState.PREFILLING]
        assert prefilling == ([] if self._prefilling is None else [self._prefilling]), f"{prefilling} all prefill"
        decoding = {s for s in running if s.state is SequenceState.DECODING and s.position < s.end_position}
        assert set(self._decoding) == decoding, "decoding sequences are missing, or others are among them"

    def _check_running(self, sequence: Sequence, in_flight: int) -> None:
        assert sequence.in_flight == in_flight, f"{sequence} is in flight {in_flight} times"
        pages = self._pages_for(max(sequence.position, sequence.prefill_end + 1))
        assert len(sequence.pages) == pages, f"{sequence} holds {len(sequence.pages)} pages and not {pages}"
        assert sequence.page_positions == len(sequence.pages) * self._page_size, f"{sequence} miscounts its pages"
        assert 0 < sequence.position <= sequence.end_position, f"{sequence} is out of bounds"
        if sequence.state in (SequenceState.FINISHED, SequenceState.PREEMPTED):
            assert in_flight, f"{sequence} holds a row that no step in flight needs"
        else:
            prefilling = sequence.position < sequence.prefill_end
            assert (sequence.state is SequenceState.PREFILLING) == prefilling, f"{sequence} is in the wrong state"
        if sequence.state is not SequenceState.FINISHED:
            missing = max(sequence.position, sequence.prefill_end) + 1 - len(sequence.tokens) // self._block_length
            assert 0 <= missing <= in_flight, f"{sequence} lacks {missing} blocks, which no step in flight brings"
            assert sequence.generated < sequence.request.params.max_tokens, f"{sequence} should have finished"

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self._page_size)

    def _admit(self, plan: StepPlan, now: float) -> Sequence | None:
        # A head that does not fit is not passed by: smaller requests behind it could keep it waiting for ever.
        sequence = self._waiting.peek()
        if sequence is None or not self._free_rows:
            return None
        prompt_pages = self._pages_for(sequence.prefill_end + 1)
        worst_pages = self._pages_for(sequence.end_position)
        pool = self._pool
        occupancy = Occupancy(pool.capacity, pool.free, self.running, self._worst_pages, prompt_pages, worst_pages)
        if not self._admission(occupancy):
            return None
        self._waiting.pop()
        self._worst_pages += worst_pages
        sequence.row = self._free_rows.pop()
        self._rows[sequence.row] = sequence
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
        sequence.state = SequenceState.PREFILLING
        self._prefilling = sequence
        plan.bound.append(sequence)
        # Up to the first decode, so that a prompt that was begun never waits for a page.
        self._grow(plan, sequence, prompt_pages)
        return sequence

    def _plan_decodes(self, plan: StepPlan) -> None:
        growing = [sequence for sequence in self._decoding if sequence.position == sequence.page_positions]
        sitting_out = self._make_room(growing) if len(growing) > self._pool.free else ()
        at_end = []
        for sequence in self._decoding:
            if sequence in sitting_out:
                continue
            self._plan_decode(plan, sequence)
            if sequence.position == sequence.end_position:
                at_end.append(sequence)
        for sequence in at_end:
            del self._decoding[sequence]

    def _make_room(self, growing: list[Sequence]) -> set[Sequence]:
        """Preempt for rows that need a page each and cannot all have one. Returns those that sit this step out.

        Pages of rows that leave at the commit of a step in flight count as there, so that nothing is preempted in
        vain; who needs those waits for the commit.
        """
        growing.sort(key=_rank)
        coming = sum(len(sequence.pages) for sequence in self._rows if sequence is not None and _is_leaving(sequence))
        while (served := self._pool.free + coming) < len(growing):
            victim = max(self._candidates(), key=_rank)
            if victim is growing[served]:
                break
            if victim is growing[-1]:
                growing.pop()
            if victim.in_flight:
                coming += len(victim.pages)
            self._preempt(victim)
        return set(growing[self._pool.free :])

    def _candidates(self) -> Iterable[Sequence]:
        """Who can be preempted: all that hold a row and have positions left to schedule."""
        return chain(self._decoding, () if self._prefilling is None else (self._prefilling,))

    def _plan_decode(self, plan: StepPlan, sequence: Sequence) -> None:
        position = sequence.position
        if position == sequence.page_positions:
            self._grow(plan, sequence, 1)
        plan.decode.append(sequence)
        plan.decode_positions.append(position)
        sequence.position = position + 1
        sequence.in_flight += 1

    def _plan_prompt(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """Plan as much of a prompt as `budget` positions allow, and the decode after it. Returns positions used."""
        length = min(sequence.prefill_end - sequence.position, budget)
        if length:
            plan.prefill.append(PrefillChunk(sequence, sequence.position, length))
            sequence.position += length
            sequence.in_flight += 1
        if sequence.position < sequence.prefill_end:
            return length
        self._prefilling = None
        sequence.state = SequenceState.DECODING
        if length < budget:
            self._plan_decode(plan, sequence)
            length += 1
        if sequence.position < sequence.end_position:
            self._decoding[sequence] = None
        return length

    def _grow(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        held, row = len(sequence.pages), sequence.bound_row
        pages = self._pool.allocate(count)
        plan.page_entries.extend((row, held + place, page) for place, page in enumerate(pages))
        sequence.pages += pages
        sequence.page_positions = len(sequence.pages) * self._page_size

    def _commit_block(self, sequence: Sequence, block: Seq[int], finite: bool, now: float) -> Delta:
        request_id = sequence.request.request_id
        if not finite:
            return self._fail(sequence, NON_FINITE_ERROR)
        first = not sequence.generated
        generated = sequence.generated + self._block_length
        # Thousands of rows a step, and hardly any begins or ends: those that do neither are not looked at closely.
        if (
            not first
            and generated < sequence.request.params.max_tokens
            and self._eos_token_id not in block
            and sequence.stop_token_ids.isdisjoint(block)
        ):
            sequence.generated = generated
            sequence.tokens += block
            return Delta(request_id=request_id, token_ids=tuple(block))
        new = block[len(sequence.forced) :]
        sequence.forced = ()
        cut = cut_answer(new, sequence.generated, sequence.request.params, sequence.stop_token_ids, self._eos_token_id)
        sequence.generated += len(cut.token_ids)
        if cut.finish_reason is None:
            sequence.tokens += block
        else:
            self._finish(sequence)
        return Delta(
            request_id=request_id,
            token_ids=cut.token_ids,
            finish_reason=cut.finish_reason,
            stop_reason=cut.stop_reason,
            timing=self._timing(sequence, now) if first else None,
        )

    def _fail(self, sequence: Sequence, error: str) -> Delta:
        self._finish(sequence)
        return Delta(request_id=sequence.request.request_id, finish_reason="error", error=error)

    def _timing(self, sequence: Sequence, now: float) -> Timing:
        scheduled = sequence.first_scheduled
        assert scheduled is not None
        return Timing(queue=scheduled - sequence.arrival, prefill=now - scheduled)

    def _finish(self, sequence: Sequence) -> None:
        """Let go of a sequence, and of its row and pages too unless a step in flight may write them."""
        del self._open[sequence.key]
        self._leave(sequence, SequenceState.FINISHED)

    def _preempt(self, sequence: Sequence) -> None:
        """Send a sequence back to wait, at once unless a step in flight may write its pages."""
        self._leave(sequence, SequenceState.PREEMPTED)

    def _leave(self, sequence: Sequence, state: SequenceState) -> None:
        if self._prefilling is sequence:
            self._prefilling = None
        self._decoding.pop(sequence, None)
        sequence.state = state
        if not sequence.in_flight:
            self._vacate(sequence)

    def _land(self, sequence: Sequence) -> None:
        sequence.in_flight -= 1
        if not sequence.in_flight:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Take the row and pages of a sequence that has left and is in no step in flight. Others keep theirs."""
        if sequence.state is SequenceState.FINISHED:
            self._release(sequence)
        elif sequence.state is SequenceState.PREEMPTED:
            self._release(sequence)
            sequence.state = SequenceState.WAITING
            sequence.position = 0
            sequence.prefill_end = len(sequence.tokens) // self._block_length - 1
            self._waiting.push_back(sequence)
            self._preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.row is None:
            return
        self._pool.release(sequence.pages)
        self._worst_pages -= self._pages_for(sequence.end_position)
        self._rows[sequence.row] = None
        self._free_rows.append(sequence.row)
        sequence.row = None
        sequence.pages = []
        sequence.page_positions = 0


_rank = attrgetter("rank")


def _is_leaving(sequence: Sequence) -> bool:
    """Whether a sequence that holds a row gives it back for certain at the commit of a step in flight."""
    has_left = sequence.state in (SequenceState.FINISHED, SequenceState.PREEMPTED)
    return has_left or sequence.position == sequence.end_position
