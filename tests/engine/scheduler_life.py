"""A scheduler's life under observation: every plan and every answer is compared with what the rules allow."""

from collections import Counter, deque
from typing import NamedTuple

import pytest

from engine.admission import AdmissionRule, Occupancy, may_admit
from engine.config import PromptAlignment
from engine.page_pool import PagePool
from engine.prefix_cache import Digest, PrefixCache, sha256
from engine.scheduler import OUT_OF_MEMORY_ERROR, QueueFullError, Scheduler
from engine.sequence import Sequence, SequenceState
from engine.step_budget import StepBudget
from engine.step_plan import StepPlan
from engine.types import SamplingParams
from tests.engine.fake_device import Answer, FakeDevice, Script, make_script
from tests.engine.scheduling import BLOCK_LENGTH, EOS, make_sequence, tokens_of

MAX_WAITING = 8
ON_ROWS = (SequenceState.PREFILLING, SequenceState.DECODING)
OPEN_STATES = [
    SequenceState.WAITING, SequenceState.PREFILLING, SequenceState.DECODING, SequenceState.PREEMPTED,
    SequenceState.SPOILED,
]  # fmt: skip


class Shape(NamedTuple):
    """Sizes of a scheduler."""

    pages: int
    max_rows: int
    page_size: int
    max_step_positions: int
    max_tokens: int = 14
    """The longest answers that are asked for."""


# Pages are short in the first three, the budget in the fourth, rows in the fifth, nothing much in the last.
SHAPES = [
    Shape(8, 4, 2, 12),
    Shape(34, 16, 1, 20, max_tokens=80),
    Shape(20, 10, 2, 11, max_tokens=80),
    Shape(40, 3, 1, 4),
    Shape(24, 1, 2, 5),
    Shape(64, 6, 1, 8),
]


class Flight(NamedTuple):
    """A step in flight: its result, the pages of its sequences, and those that it writes."""

    plan: StepPlan
    blocks: list[list[int]]
    finite: list[bool]
    failed: set[Sequence]
    pages: frozenset[int]
    written: frozenset[int]

    @property
    def sequences(self) -> set[Sequence]:
        """Who is worked on."""
        return {chunk.sequence for chunk in self.plan.prefill} | set(self.plan.decode)


def reckless(pages: Occupancy) -> bool:
    """Admit whatever has room for its prompt: leads to many more preemptions than the engine's rule."""
    return pages.free >= pages.prompt


def rank(sequence: Sequence) -> tuple[int, int]:
    """Priority and arrival, from the request alone: keys count up."""
    return sequence.request.priority, sequence.request.request_id


class SchedulerLife:
    """`max_in_flight` 1 is the synchronous loop; 2 plans a step while the one ahead of it has not been committed."""

    def __init__(
        self, shape: Shape, max_in_flight: int, admission: AdmissionRule = may_admit, digest: Digest = sha256
    ) -> None:
        self.max_in_flight = max_in_flight
        self.seen: Counter[str] = Counter()
        self.scripts: dict[int, Script] = {}
        self.sequences: dict[int, Sequence] = {}
        self.answers: dict[int, Answer] = {}
        self.queue: list[tuple[int, int]] = []
        self.preempted: Counter[int] = Counter()
        self.in_flight: deque[Flight] = deque()
        self.now = 0.0
        self.shape = shape
        self.admission = admission
        self.pool = PagePool(shape.pages)
        self.cache = PrefixCache(self.pool, shape.page_size, digest=digest)
        self.scheduler = Scheduler(
            pool=self.pool,
            max_rows=shape.max_rows,
            max_waiting=MAX_WAITING,
            page_size=shape.page_size,
            budget=StepBudget(shape.max_step_positions),
            block_length=BLOCK_LENGTH,
            eos_token_id=EOS,
            admission=admission,
            prefix_cache=self.cache,
        )
        self.device = FakeDevice(shape.page_size, self.scripts)

    def add(
        self,
        count: int,
        seed: int,
        prompt: int,
        params: SamplingParams,
        alignment: PromptAlignment,
        priority: int,
        rare: int,
    ) -> None:
        first = len(self.scripts)
        group = []
        for key in range(first, first + count):
            script = make_script(key, seed + key, prompt, params, alignment, priority=priority, rare=rare)
            self.scripts[key] = script
            token_ids = script.request.prompt_token_ids
            sequence = make_sequence(
                key, token_ids, params=params, priority=priority, alignment=alignment, arrival=self.now,
                cache_salt=script.request.cache_salt,
            )  # fmt: skip
            group.append(sequence)
        full = self.scheduler.waiting + count > MAX_WAITING + self.shape.max_rows - self.scheduler.running
        if full:
            with pytest.raises(QueueFullError):
                self.scheduler.add(group)
            self.seen["queue full"] += 1
        else:
            self.scheduler.add(group)
            for sequence in group:
                key = sequence.request.request_id
                self.sequences[key] = sequence
                self.answers[key] = Answer()
                self.queue.append((priority, key))
            self.queue.sort()
        self.check()

    def schedule(self, failing: int | None = None) -> bool:
        """Plan a step and run it; the device has no memory for the sequence of it that the number `failing` chooses."""
        self.now += 1
        before = {s: s.state for s in self.open_sequences() if s.state in ON_ROWS and s.position < s.end_position}
        plan = self.scheduler.schedule(self.now)
        self.check_preemptions(before)
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "there is work, and nothing is done about it"
        else:
            self.check_plan(plan)
            self.in_flight.append(self.launch(plan, failing))
            self.seen["decoded in the step of its last chunk"] += any(c.sequence in plan.decode for c in plan.prefill)
        self.check()
        return plan is not None

    def launch(self, plan: StepPlan, failing: int | None) -> Flight:
        prompts = [chunk.sequence for chunk in plan.prefill]
        worked = prompts + plan.decode
        given_up = {sequence for flight in self.in_flight for sequence in flight.failed}
        # Often the first of the prompts, since those behind it may share its pages.
        candidates = prompts[:1] if prompts and failing and failing % 2 else worked
        failed = set() if failing is None else {candidates[failing % len(candidates)]} - given_up
        pages = frozenset(page for sequence in worked for page in sequence.pages)
        blocks, finite = self.device.run(plan, given_up | failed)
        return Flight(plan, blocks, finite, failed, pages, self.written(plan))

    def written(self, plan: StepPlan) -> frozenset[int]:
        """Pages of the positions that a plan works on."""
        decodes = zip(plan.decode, plan.decode_positions.tolist(), strict=True)
        spans = [*plan.prefill, *((sequence, position, 1) for sequence, position in decodes)]
        size = self.shape.page_size
        return frozenset(s.pages[place // size] for s, start, length in spans for place in range(start, start + length))

    def commit(self) -> None:
        if not self.in_flight:
            return
        self.now += 1
        plan, blocks, finite, failed, _, _ = self.in_flight.popleft()
        on_rows = [sequence for sequence in self.open_sequences() if sequence.row is not None]
        leaving = [sequence for sequence in on_rows if sequence.state is SequenceState.PREEMPTED]
        spoiled = [sequence for sequence in on_rows if sequence.state is SequenceState.SPOILED]
        for sequence, delta in self.scheduler.commit(plan, blocks, finite, self.now, failed=failed):
            assert sequence in failed or sequence not in spoiled, "who read what was not written was given something"
            key = sequence.request.request_id
            assert delta.request_id == key
            self.seen["delivered after it was preempted"] += sequence in leaving
            self.seen["ended after it was preempted"] += sequence in leaving and delta.finish_reason is not None
            self.answers[key].take(delta)
            if sequence in failed:
                self.close_failed(key, delta.error)
            elif delta.finish_reason is None:
                self.check_tokens(sequence)
            else:
                self.close(key)
        for sequence in on_rows:
            sent_back = sequence.state in (SequenceState.WAITING, SequenceState.SPOILED)
            if sent_back and sequence not in spoiled and sequence not in leaving:
                self.seen["spoiled in flight" if sequence.in_flight else "spoiled"] += 1
            if sequence.state is SequenceState.WAITING:
                self.queue_again(sequence)
        self.check()

    def run(self, steps: int) -> None:
        """A while of the engine's loop, with as many steps in flight as may be."""
        for _ in range(steps):
            while len(self.in_flight) < self.max_in_flight and self.schedule():
                pass
            self.commit()

    def commit_all(self) -> None:
        """Wait for the device."""
        while self.in_flight:
            self.commit()

    def abort_key(self, key: int) -> None:
        sequence = self.sequences[key]
        flight = "in flight" if sequence.in_flight else "idle"
        at_end = ", all scheduled" if sequence.position == sequence.end_position else ""
        self.seen[f"abort {sequence.state.value} {flight}{at_end}"] += 1
        if sequence.state is SequenceState.WAITING:
            self.queue.remove((sequence.request.priority, key))
        assert self.scheduler.abort(key)
        del self.answers[key]
        assert not self.scheduler.abort(key)
        assert (sequence.row is None) == (not sequence.in_flight)
        self.check()

    def abort(self, state: SequenceState, choice: int, *, in_flight: bool) -> None:
        """Abort an open sequence in this state, if there is one."""
        keys = [
            key
            for key in self.answers
            if self.sequences[key].state is state and bool(self.sequences[key].in_flight) == in_flight
        ]
        if keys:
            self.abort_key(keys[choice % len(keys)])

    def abort_what_has_ended(self, choice: int) -> None:
        ended = sorted(self.scripts.keys() - self.answers.keys())
        if ended:
            key = ended[choice % len(ended)]
            finished = key in self.sequences and self.sequences[key].state is SequenceState.FINISHED
            self.seen["abort finished in flight"] += finished and self.sequences[key].in_flight > 0
            assert not self.scheduler.abort(key)
            self.check()

    def close(self, key: int) -> None:
        """Compare an answer that has ended with its script."""
        answer, script = self.answers.pop(key), self.scripts[key]
        assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == script.expected()
        place = (len(script.sequence_prompt[1]) + len(answer.token_ids) - 1) % BLOCK_LENGTH
        if answer.finish_reason == "stop":
            kind = "EOS" if answer.stop_reason is None else "stop token"
            self.seen[f"{kind} at offset {place}"] += 1
        else:
            self.seen[f"{answer.finish_reason} at offset {place}"] += 1
        self.seen["ended with a step in flight"] += self.sequences[key].in_flight > 0

    def close_failed(self, key: int, error: str | None) -> None:
        """An answer that the device had no memory for: what came before is right."""
        answer, script = self.answers.pop(key), self.scripts[key]
        assert answer.finish_reason == "error" and error == OUT_OF_MEMORY_ERROR
        assert answer.token_ids == script.expected()[0][: len(answer.token_ids)]
        self.seen["out of memory"] += 1

    def open_sequences(self) -> list[Sequence]:
        """Those whose answers have not ended."""
        return [self.sequences[key] for key in self.answers]

    def check_preemptions(self, before: dict[Sequence, SequenceState]) -> None:
        """Those in `before` had positions left to schedule; who lost its row has to be behind all who did not."""
        victims = [s for s in before if s.state in (SequenceState.PREEMPTED, SequenceState.WAITING)]
        kept = [sequence for sequence in before if sequence not in victims]
        if not victims:
            return
        assert kept, "all were preempted, and nobody for whom"
        assert max(map(rank, kept)) < min(map(rank, victims)), "others were preempted than were last"
        self.seen["preempted the older of lower priority"] += any(
            victim.request.request_id < sequence.request.request_id for victim in victims for sequence in kept
        )
        for sequence in victims:
            in_flight = sequence.state is SequenceState.PREEMPTED
            assert in_flight == any(sequence in flight.sequences for flight in self.in_flight)
            self.seen["preempted in flight" if in_flight else "preempted idle"] += 1
            self.seen["preempted while prefilling"] += before[sequence] is SequenceState.PREFILLING
            if not in_flight:
                self.queue_again(sequence)

    def queue_again(self, sequence: Sequence) -> None:
        key = sequence.request.request_id
        self.preempted[key] += 1
        self.seen["preempted"] += 1
        self.seen["preempted twice"] += self.preempted[key] == 2
        forced = bool(self.scripts[key].sequence_prompt[1])
        self.seen["preempted before its forced block"] += forced and not sequence.generated
        self.seen["preempted after its forced block"] += forced and sequence.generated > 0
        self.queue.append(rank(sequence))
        self.queue.sort()

    def check_plan(self, plan: StepPlan) -> None:
        shape, scheduler = self.shape, self.scheduler
        bound = [sequence.request.request_id for sequence in plan.bound]
        assert bound == [key for _, key in self.queue[: len(bound)]], "others were admitted than were next"
        del self.queue[: len(bound)]
        self.check_nothing_in_flight_is_taken(plan)
        self.see_what_is_shared(plan)
        assert plan.positions <= shape.max_step_positions
        assert len(set(plan.decode)) == len(plan.decode) and not any(chunk.length < 1 for chunk in plan.prefill)
        worked = {chunk.sequence for chunk in plan.prefill} | set(plan.decode)
        assert set(plan.bound) <= worked, "a row was given out without work"
        assert all(sequence.state in ON_ROWS for sequence in worked)
        left = shape.max_step_positions - plan.positions
        behind = [s for s in self.open_sequences() if s.state is SequenceState.PREFILLING]
        assert not (left and behind), "budget is left, and a prompt is not done"
        self.check_who_sat_out(plan, left)
        if self.queue and left and scheduler.running < shape.max_rows:
            head = self.sequences[self.queue[0][1]]
            on_rows = [sequence for sequence in self.sequences.values() if sequence.row is not None]
            occupancy = Occupancy(
                capacity=shape.pages,
                free=self.pool.free,
                running=len(on_rows),
                running_worst=sum(-(-sequence.end_position // shape.page_size) for sequence in on_rows),
                prompt=-(-len(head.blocks) // shape.page_size) - self.cache.held(self.cache.find(head)),
                worst=-(-head.end_position // shape.page_size),
            )
            assert not self.admission(occupancy), "a sequence waits for nothing"
            self.seen["head waits for pages"] += 1

    def check_nothing_in_flight_is_taken(self, plan: StepPlan) -> None:
        rows = {sequence.row for sequence in plan.bound}
        pages = set(plan.page_entries[:, 2].tolist())
        for sequence in plan.bound:
            pages -= set(self.shared_pages(plan, sequence))
        for flight in self.in_flight:
            assert flight.sequences.isdisjoint(plan.bound), "a sequence was admitted before it had landed"
            assert flight.pages.isdisjoint(pages), "a page was given away while a step in flight may write it"
            assert rows.isdisjoint(sequence.row for sequence in flight.sequences), "a row in flight was given away"

    def shared_pages(self, plan: StepPlan, sequence: Sequence) -> list[int]:
        """Pages ahead of the first position that the plan, which gives the sequence its row, works on."""
        starts = [chunk.start for chunk in plan.prefill if chunk.sequence is sequence]
        start = starts[0] if starts else int(plan.decode_positions[plan.decode.index(sequence)])
        return sequence.pages[: start // self.shape.page_size]

    def see_what_is_shared(self, plan: StepPlan) -> None:
        for sequence in plan.bound:
            pages = set(self.shared_pages(plan, sequence))
            if not pages:
                continue
            self.seen["shared"] += 1
            self.seen["all of a prompt shared"] += sequence not in [chunk.sequence for chunk in plan.prefill]
            self.seen["shared in the step that writes it"] += not pages.isdisjoint(self.written(plan))
            self.seen["shared with a step in flight"] += any(not pages.isdisjoint(f.written) for f in self.in_flight)
            self.seen["found again when it had been preempted"] += self.preempted[sequence.request.request_id] > 0
            self.seen["held by nobody else"] += any(self.pool.holders(page) == 1 for page in pages)

    def check_who_sat_out(self, plan: StepPlan, left: int) -> None:
        """Rows that could decode do, unless they need a page and those ahead of them took the last ones."""
        going_on = [
            sequence
            for sequence in self.open_sequences()
            if sequence.state is SequenceState.DECODING and sequence.position < sequence.end_position
        ]
        out = [sequence for sequence in going_on if sequence not in plan.decode]
        if not left or not out:
            return
        self.seen["sat a step out"] += 1
        grown = [self.sequence_in(row) for row in plan.page_entries[:, 0].tolist()]
        for sequence in out:
            assert sequence.position == sequence.page_positions, "a row that could decode was left out"
            assert not self.pool.free, "a row sat out although a page was free"
            assert all(rank(other) < rank(sequence) for other in grown), "a page went to one behind who needs it"

    def sequence_in(self, row: int) -> Sequence:
        return next(sequence for sequence in self.sequences.values() if sequence.row == row)

    def check_tokens(self, sequence: Sequence) -> None:
        script = self.scripts[sequence.request.request_id]
        prompt, forced = script.sequence_prompt
        assert tokens_of(sequence) == script.stream[: len(prompt) + len(forced) + sequence.generated]

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.waiting == len(self.queue)
        holding = [sequence for sequence in self.sequences.values() if sequence.row is not None]
        assert self.scheduler.running == len(holding)
        assert self.pool.used == len({page for sequence in holding for page in sequence.pages})
        assert self.scheduler.preemptions == self.preempted.total()

    def drain(self) -> None:
        """Let everything end: it has to, and then nothing may be held."""
        steps = sum(sequence.end_position for sequence in self.sequences.values()) + len(self.in_flight) + 2
        for _ in range(2 * steps):
            if not self.scheduler.has_work:
                break
            if len(self.in_flight) < self.max_in_flight:
                self.schedule()
            self.commit()
        assert not self.scheduler.has_work and not self.in_flight and not self.answers
        assert self.pool.used == 0
