"""Who gets a row, pages and a part of the next step, and what a step's tokens mean for each request.

`schedule` plans a step, `commit` takes its result; both are plain Python and numpy on integers. A step may be planned
before the one ahead of it is committed: a decoding row gains exactly one position a step, so pages and length finishes
are known without its tokens. Only EOS, stop tokens, errors and aborts lag; a sequence they end while a step that
includes it is in flight keeps its row and pages until that step is committed, and gains nothing from it.
"""

from collections import Counter, deque
from collections.abc import Collection, Hashable
from collections.abc import Sequence as Seq
from operator import attrgetter

import msgspec
import numpy as np

from engine.admission import AdmissionRule, Occupancy, may_admit
from engine.deltas import StepDeltas
from engine.finish import cut_answer
from engine.page_pool import PagePool
from engine.prefix_cache import PrefixCache
from engine.row_table import Flags, Int32, Rows, RowTable
from engine.sequence import Sequence, SequenceState
from engine.step_budget import StepBudget
from engine.step_plan import BlockLogprobs, PageRun, PrefillChunk, StepPlan
from engine.types import Delta, InvalidRequestError, Timing
from engine.waiting_queue import WaitingQueue

NON_FINITE_ERROR = "the model produced non-finite logits for this request, so no token could be chosen"
OUT_OF_MEMORY_ERROR = "the device ran out of memory for this request; try again later, or with a shorter prompt"


class QueueFullError(Exception):
    """As many requests wait as may wait. Trying again later can succeed."""


class Scheduler:
    """Rows, pages and the queue of one engine.

    `budget` has to exceed `max_rows`, so that a full batch of decoding rows still leaves room for prompts.
    An `admission` rule has to admit whatever the pool can hold when nothing runs, and never more pages than are free.
    Without a `prefix_cache` of the pool, no pages are shared.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        max_rows: int,
        max_waiting: int,
        page_size: int,
        budget: StepBudget,
        block_length: int,
        eos_token_id: int,
        admission: AdmissionRule = may_admit,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if budget.positions <= max_rows:
            raise ValueError(f"max_step_positions {budget.positions} has to exceed max_rows {max_rows}")
        self._pool = pool
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._page_size = page_size
        self._budget = budget
        self._block_length = block_length
        self._eos_token_id = eos_token_id
        self._admission = admission
        self._cache = prefix_cache or PrefixCache(pool, page_size, enabled=False)
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._rows = RowTable(max_rows, block_length)
        self._worst_pages = 0
        self._waiting = WaitingQueue()
        self._open: dict[Hashable, Sequence] = {}
        # One at most: the next prompt is begun only with budget that the one before it has left.
        self._prefilling: Sequence | None = None
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
        budget = self._budget.positions - len(plan.decode)
        first_decodes: list[int] = []
        if self._prefilling is not None:
            budget -= self._plan_prompt(plan, self._prefilling, budget, first_decodes)
        while budget and (admitted := self._admit(plan, now)) is not None:
            budget -= self._plan_prompt(plan, admitted, budget, first_decodes)
        self._decode(plan, np.array(first_decodes, np.intp))
        plan.adjusted = bool(self._rows.adjusted[plan.rows].any())
        if not plan.decode and not plan.prefill:
            return None
        self._planned += 1
        self._steps.append(plan)
        return plan

    def commit(
        self,
        plan: StepPlan,
        tokens: Seq[Seq[int]] | Int32,
        finite: Seq[bool] | Flags,
        now: float,
        failed: Collection[Sequence] = (),
        logprobs: BlockLogprobs | None = None,
    ) -> StepDeltas:
        """Take the result of the oldest step in flight: what it added to each sequence that was not finished.

        `tokens` [rows, L] and `finite` [rows] go with `plan.decode`: a whole block, forced tokens included, and whether
        its logits were finite; so do the `logprobs` of an adjusted step. The device had no memory for what `failed`
        names, sequences of the plan: they end here, and their tokens are not looked at. Raises ValueError for another
        plan or other lengths, before anything is changed.
        """
        if not self._steps or self._steps[0] is not plan:
            raise ValueError("steps have to be committed once each, in the order they were scheduled")
        if not len(plan.decode) == len(tokens) == len(finite):
            raise ValueError(f"{len(plan.decode)} rows decoded, but {len(tokens)} blocks and {len(finite)} flags came")
        self._steps.popleft()
        others = self._commit_failures(failed) if failed else []
        if plan.prefill:
            self._cache.confirm(plan.number)
            # One chunk of a row at most, so each is counted.
            self._land(np.array([chunk.sequence.bound_row for chunk in plan.prefill]))
        blocks = np.asarray(tokens, np.int32).reshape(-1, self._block_length)
        good = np.asarray(finite, bool)
        whole = self._rows.takes_whole(plan.rows, blocks, good, self._eos_token_id)
        # Of those that go on, all at once: their places, and how many tokens each has more.
        going_on: list[int] = []
        gained: list[int] = []
        for place in np.flatnonzero(~whole & self._rows.open[plan.rows]).tolist():
            sequence = plan.decode[place]
            skipped = len(sequence.forced)
            delta = self._commit_block(sequence, blocks[place], bool(good[place]), now)
            if delta.finish_reason is None:
                going_on.append(place)
                gained.append(len(delta.token_ids))
            top = sequence.request.params.logprobs
            if logprobs is not None and top is not None:
                told = logprobs.of_row(place, skipped, skipped + len(delta.token_ids), top)
                delta = msgspec.structs.replace(delta, logprobs=told)
            others.append((sequence, delta))
        if going_on:
            self._rows.append(plan.rows[going_on], blocks[going_on], gained)
        rows = plan.rows
        if not whole.all():
            rows, blocks = rows[whole], blocks[whole]
        self._rows.append(rows, blocks, blocks.shape[1])
        deltas = StepDeltas(self._rows.sequences[rows].tolist(), blocks, others)
        self._land(plan.rows)
        return deltas

    def check_integrity(self) -> None:
        """Raises AssertionError where rows, pages, states or the queue contradict one another. Costs O(everything)."""
        sequences: list[Sequence | None] = self._rows.sequences.tolist()
        running = [sequence for sequence in sequences if sequence is not None]
        for row, sequence in enumerate(sequences):
            assert (sequence is None) == (row in self._free_rows), f"row {row} is both free and taken, or neither"
            assert sequence is None or sequence.row == row, f"{sequence} sits in row {row}"
        assert len(set(self._free_rows)) == len(self._free_rows), "a row is free twice"
        self._pool.check_integrity(sequence.pages for sequence in running)
        self._cache.check_integrity()
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
        self._check_flags(running)

    def _check_flags(self, running: list[Sequence]) -> None:
        flags = (
            (self._rows.open, [s for s in running if s.state not in _GAINING_NOTHING]),
            (self._rows.leaving, [s for s in running if _has_left(s)]),
            (
                self._rows.decoding,
                [s for s in running if s.state is SequenceState.DECODING and s.position < s.end_position],
            ),
        )
        for number, (flagged, expected) in enumerate(flags):
            rows = sorted(sequence.bound_row for sequence in expected)
            assert np.flatnonzero(flagged).tolist() == rows, f"rows {rows} should be flagged (flag {number})"

    def _check_running(self, sequence: Sequence, in_flight: int) -> None:
        assert sequence.in_flight == in_flight, f"{sequence} is in flight {in_flight} times"
        pages = self._pages_for(max(sequence.position, sequence.prefill_end + 1))
        assert len(sequence.pages) == pages, f"{sequence} holds {len(sequence.pages)} pages and not {pages}"
        assert sequence.page_positions == len(sequence.pages) * self._page_size, f"{sequence} miscounts its pages"
        assert 0 < sequence.position <= sequence.end_position, f"{sequence} is out of bounds"
        if _has_left(sequence):
            assert in_flight, f"{sequence} holds a row that no step in flight needs"
        else:
            prefilling = sequence.position < sequence.prefill_end
            assert (sequence.state is SequenceState.PREFILLING) == prefilling, f"{sequence} is in the wrong state"
        if sequence.state not in _GAINING_NOTHING:
            missing = max(sequence.position, sequence.prefill_end) + 1 - len(sequence.blocks)
            assert 0 <= missing <= in_flight, f"{sequence} lacks {missing} blocks, which no step in flight brings"
        if sequence.state is not SequenceState.FINISHED:
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
        self._cache.enroll(sequence)
        pool, found = self._pool, self._cache.find(sequence)
        taken = prompt_pages - self._cache.held(found)
        occupancy = Occupancy(pool.capacity, pool.free, self.running, self._worst_pages, taken, worst_pages)
        if not self._admission(occupancy):
            return None
        self._waiting.pop()
        self._worst_pages += worst_pages
        row = self._free_rows.pop()
        sequence.take_row(row, self._rows)
        cached_tokens = self._cache.take(sequence, found)
        if sequence.first_scheduled is None:
            sequence.first_scheduled, sequence.cached_tokens = now, cached_tokens
            self._cache.count(sequence.prompt_tokens, cached_tokens)
        sequence.state = SequenceState.PREFILLING
        self._prefilling = sequence
        plan.bound.append(sequence)
        # Up to the first decode, so that a prompt that was begun never waits for a page.
        pages = found + self._cache.allocate(prompt_pages - len(found))
        plan.page_runs.append(PageRun(row, pages))
        sequence.pages += pages
        self._rows.position[row] = len(found) * self._page_size
        self._rows.page_positions[row] = prompt_pages * self._page_size
        return sequence

    def _plan_decodes(self, plan: StepPlan) -> None:
        table = self._rows
        rows = np.flatnonzero(table.decoding)
        growing = rows[table.position[rows] == table.page_positions[rows]]
        if len(growing) > self._pool.free:
            sitting_out = [sequence.bound_row for sequence in self._make_room(table.sequences[growing].tolist())]
            rows = np.setdiff1d(np.flatnonzero(table.decoding), np.array(sitting_out, np.intp))
            growing = rows[table.position[rows] == table.page_positions[rows]]
        self._grow_rows(plan, growing)
        self._decode(plan, rows)

    def _grow_rows(self, plan: StepPlan, rows: Rows) -> None:
        """Give each of the rows one page more."""
        table = self._rows
        pages = self._cache.allocate(len(rows))
        places = table.page_positions[rows] // self._page_size
        plan.grown = np.array((rows, places, pages), np.int64).T
        for sequence, page in zip(table.sequences[rows].tolist(), pages, strict=True):
            sequence.pages.append(page)
        table.page_positions[rows] += self._page_size

    def _decode(self, plan: StepPlan, rows: Rows) -> None:
        """Add rows to a plan, behind those that decode already. They have room for the position."""
        table = self._rows
        positions = table.position[rows]
        plan.rows = np.concatenate((plan.rows, rows))
        plan.decode_positions = np.concatenate((plan.decode_positions, positions))
        plan.decode += table.sequences[rows].tolist()
        table.position[rows] = positions + 1
        table.in_flight[rows] += 1
        table.decoding[rows] = positions + 1 < table.end_position[rows]

    def _make_room(self, growing: list[Sequence]) -> set[Sequence]:
        """Preempt for rows that need a page each and cannot all have one. Returns those that sit this step out.

        Pages of rows that leave at the commit of a step in flight count as there, so that nothing is preempted in
        vain; who needs those waits for the commit.
        """
        growing.sort(key=_rank)
        holding = [sequence for sequence in self._rows.sequences.tolist() if sequence is not None]
        leaving = [sequence for sequence in holding if _is_leaving(sequence)]
        # Counted anew each time: a page that several share is free when the last of them has left.
        while (served := self._pool.free + self._pool.freed_by(s.pages for s in leaving)) < len(growing):
            victim = max(self._candidates(), key=_rank)
            if victim is growing[served]:
                break
            if victim is growing[-1]:
                growing.pop()
            if victim.in_flight:
                leaving.append(victim)
            self._preempt(victim)
        return set(growing[self._pool.free :])

    def _candidates(self) -> list[Sequence]:
        """Who can be preempted: all that hold a row and have positions left to schedule."""
        prefilling = [] if self._prefilling is None else [self._prefilling]
        decoding: list[Sequence] = self._rows.sequences[self._rows.decoding].tolist()
        return decoding + prefilling

    def _plan_prompt(self, plan: StepPlan, sequence: Sequence, budget: int, first_decodes: list[int]) -> int:
        """Plan as much of a prompt as `budget` allows. Returns what it costs.

        A position of it is the decode behind the prompt, if there is budget for it: its row goes to `first_decodes`.
        """
        table, row, start = self._rows, sequence.bound_row, sequence.position
        length = min(sequence.prefill_end - start, self._budget.affordable(start, budget))
        cost = min(self._budget.cost(start, length), budget)
        if length:
            plan.prefill.append(PrefillChunk(sequence, start, length))
            table.position[row] += length
            table.in_flight[row] += 1
            self._cache.publish(sequence, start, start + length, plan.number)
        if start + length < sequence.prefill_end:
            return budget
        self._prefilling = None
        sequence.state = SequenceState.DECODING
        table.decoding[row] = True
        if cost < budget:
            first_decodes.append(row)
            cost += 1
        return cost

    def _commit_block(self, sequence: Sequence, block: Int32, finite: bool, now: float) -> Delta:
        if not finite:
            return self._fail(sequence, NON_FINITE_ERROR)
        row, generated = sequence.bound_row, sequence.generated
        new = block.tolist()[len(sequence.forced) :]
        sequence.forced = ()
        cut = cut_answer(new, generated, sequence.request.params, sequence.stop_token_ids, self._eos_token_id)
        if cut.finish_reason is not None:
            self._rows.generated[row] += len(cut.token_ids)
            self._finish(sequence)
        return Delta(
            request_id=sequence.request.request_id,
            token_ids=cut.token_ids,
            finish_reason=cut.finish_reason,
            stop_reason=cut.stop_reason,
            timing=None if generated else self._timing(sequence, now),
            cached_tokens=0 if generated else sequence.cached_tokens,
        )

    def _commit_failures(self, failed: Collection[Sequence]) -> list[tuple[Sequence, Delta]]:
        """End what the device had no memory for, and send back those that share pages which were to be written."""
        spoiled = self._cache.fail(failed)
        deltas = [
            (sequence, self._fail(sequence, OUT_OF_MEMORY_ERROR))
            for sequence in failed
            if sequence.state is not SequenceState.FINISHED
        ]
        for sequence in self._rows.sequences.tolist() if spoiled else ():
            if sequence is not None and sequence.state not in _GAINING_NOTHING:
                if not spoiled.isdisjoint(sequence.pages):
                    sequence.cached_tokens = 0
                    self._leave(sequence, SequenceState.SPOILED)
        return deltas

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
        sequence.state = state
        if sequence.row is None:
            return
        table, row = self._rows, sequence.row
        table.decoding[row] = False
        table.leaving[row] = True
        table.open[row] = state not in _GAINING_NOTHING
        if not sequence.in_flight:
            self._vacate(sequence)

    def _land(self, rows: Rows) -> None:
        """One chunk or decode of each of the rows is committed: they lose those that have left and are in no other."""
        table = self._rows
        table.in_flight[rows] -= 1
        for row in rows[table.leaving[rows] & (table.in_flight[rows] == 0)]:
            self._vacate(table.sequences[row])

    def _vacate(self, sequence: Sequence) -> None:
        """Take the row and pages of a sequence that has left and is in no step in flight."""
        if sequence.state is not SequenceState.FINISHED:
            sequence.prefill_end = len(sequence.blocks) - 1
        if sequence.state is SequenceState.PREEMPTED:
            # All that it wrote is its prompt now, and may still be there when its turn comes.
            self._cache.enroll(sequence)
            self._cache.publish(sequence, 0, sequence.position, step=None)
        # What is kept is lost in this order: a chain's tail before its head.
        self._pool.release(reversed(sequence.pages))
        self._worst_pages -= self._pages_for(sequence.end_position)
        self._free_rows.append(sequence.leave_row())
        if sequence.state is not SequenceState.FINISHED:
            sequence.state = SequenceState.WAITING
            self._waiting.push_back(sequence)
            self._preemptions += 1


_rank = attrgetter("rank")

_GAINING_NOTHING = (SequenceState.FINISHED, SequenceState.SPOILED)


def _has_left(sequence: Sequence) -> bool:
    return sequence.state in (*_GAINING_NOTHING, SequenceState.PREEMPTED)


def _is_leaving(sequence: Sequence) -> bool:
    """Whether a sequence that holds a row gives it back for certain at the commit of a step in flight."""
    return _has_left(sequence) or sequence.position == sequence.end_position
