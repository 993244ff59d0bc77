"""Random lives of a scheduler: whatever arrives, ends or is aborted when, every answer is the one its script says."""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from engine.admission import AdmissionRule, may_admit
from engine.config import PromptAlignment
from engine.sequence import SequenceState
from engine.types import SamplingParams
from tests.engine.fake_device import STOP_TOKEN
from tests.engine.scheduler_life import OPEN_STATES, SHAPES, SchedulerLife, Shape, reckless
from tests.engine.scheduling import BLOCK_LENGTH, EOS

ALIGNMENTS: list[PromptAlignment] = ["left_pad", "forced_tail"]
STOP_TOKEN_IDS: list[tuple[int, ...]] = [(), (), (STOP_TOKEN,), (STOP_TOKEN, EOS)]
OFFSETS = range(BLOCK_LENGTH)


@st.composite
def params_of(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 14))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)) if draw(st.booleans()) else 0,
        ignore_eos=draw(st.integers(0, 3)) == 0,
        stop_token_ids=draw(st.sampled_from([(), (), (STOP_TOKEN,), (STOP_TOKEN, EOS)])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Hypothesis chooses what happens, and shortens what went wrong."""

    max_in_flight = 1

    @initialize(shape=st.sampled_from(SHAPES), admission=st.sampled_from([may_admit, reckless]))
    def begin(self, shape: Shape, admission: AdmissionRule) -> None:
        self.life = SchedulerLife(shape, self.max_in_flight, admission)

    @rule(
        count=st.integers(1, 4), seed=st.integers(0, 10**6), prompt=st.integers(1, 48), params=params_of(),
        alignment=st.sampled_from(ALIGNMENTS), priority=st.integers(-1, 1), rare=st.sampled_from([3, 8, 50]),
    )  # fmt: skip
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
        self.life.add(count, seed, prompt, params, alignment, priority, rare)

    @rule(failing=st.none() | st.integers(0, 100))
    def schedule(self, failing: int | None) -> None:
        if len(self.life.in_flight) < self.max_in_flight:
            self.life.schedule(failing)

    @rule()
    def commit(self) -> None:
        self.life.commit()

    @rule(steps=st.integers(1, 4))
    def run(self, steps: int) -> None:
        self.life.run(steps)

    @rule(state=st.sampled_from(OPEN_STATES), in_flight=st.booleans(), choice=st.integers(0, 100))
    def abort(self, state: SequenceState, in_flight: bool, choice: int) -> None:
        self.life.abort(state, choice, in_flight=in_flight)

    @rule(choice=st.integers(0, 100))
    def abort_what_has_ended(self, choice: int) -> None:
        self.life.abort_what_has_ended(choice)

    def teardown(self) -> None:
        self.life.drain()


class LaggingMachine(SchedulerMachine):
    """One step of lag."""

    max_in_flight = 2


@pytest.mark.parametrize("machine", [SchedulerMachine, LaggingMachine])
def test_no_short_life_breaks_a_rule(machine: type[SchedulerMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200, stateful_step_count=40, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


ALWAYS_SEEN = {
    "abort waiting idle",
    "abort prefilling idle",
    "abort prefilling in flight",
    "abort decoding idle",
    "abort decoding in flight",
    "abort decoding in flight, all scheduled",
    *(f"EOS at offset {offset}" for offset in OFFSETS),
    *(f"stop token at offset {offset}" for offset in OFFSETS),
    *(f"length at offset {offset}" for offset in OFFSETS),
    "error at offset 3",
    "queue full",
    "head waits for pages",
    "decoded in the step of its last chunk",
    "preempted",
    "preempted idle",
    "preempted after its forced block",
    "preempted the older of lower priority",
    "sat a step out",
    "out of memory",
    "shared",
    "all of a prompt shared",
    "shared in the step that writes it",
    "held by nobody else",
    "found again when it had been preempted",
    "spoiled",
}
SEEN_UNDER_PRESSURE = {"preempted twice", "preempted while prefilling", "preempted before its forced block"}
SEEN_WITH_LAG = {
    "abort finished in flight",
    "delivered after it was preempted",
    "ended after it was preempted",
    "ended with a step in flight",
    "preempted in flight",
    "shared with a step in flight",
    "spoiled in flight",
}
SEEN_UNDER_PRESSURE_WITH_LAG = {"abort preempted in flight"}


def random_params(rng: random.Random, longest: int) -> SamplingParams:
    max_tokens = rng.randint(1, longest)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, rng.randint(0, max_tokens))),
        ignore_eos=not rng.randrange(4),
        stop_token_ids=rng.choice(STOP_TOKEN_IDS),
    )


def act(life: SchedulerLife, rng: random.Random) -> None:
    """One random thing that can happen to a scheduler."""
    actions = ("add", "schedule", "fail", "commit", "run", "wait", "abort", "late abort")
    match rng.choices(actions, (6, 4, 2, 5, 3, 1, 4, 2))[0]:
        case "add":
            prompt = rng.randint(1, rng.choice((6, 48)))
            priority, rare = rng.randint(-1, 1), rng.choice((3, 8, 50))
            alignment = rng.choice(ALIGNMENTS)
            params = random_params(rng, life.shape.max_tokens)
            life.add(rng.randint(1, 4), rng.randrange(10**6), prompt, params, alignment, priority, rare)
        case "schedule" if len(life.in_flight) < life.max_in_flight:
            life.schedule()
        case "fail" if len(life.in_flight) < life.max_in_flight:
            life.schedule(rng.randrange(100))
        case "commit":
            life.commit()
        case "run":
            life.run(rng.randint(1, 4))
        case "wait":
            life.commit_all()
        case "abort":
            state = rng.choice((*OPEN_STATES, SequenceState.PREEMPTED))
            life.abort(state, rng.randrange(100), in_flight=rng.random() < 0.5)
        case "late abort":
            life.abort_what_has_ended(rng.randrange(100))


def live(max_in_flight: int, admission: AdmissionRule) -> set[str]:
    """Lives in all shapes, and what happened in them."""
    seen: Counter[str] = Counter()
    for seed, shape in enumerate(SHAPES * 3):
        rng = random.Random(seed)
        life = SchedulerLife(shape, max_in_flight, admission)
        for _ in range(500):
            act(life, rng)
        life.drain()
        seen += life.seen
    return {name for name, times in seen.items() if times}


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_no_long_life_breaks_a_rule_and_all_has_happened(max_in_flight: int) -> None:
    seen = live(max_in_flight, may_admit)
    assert ALWAYS_SEEN | (SEEN_WITH_LAG if max_in_flight > 1 else set()) <= seen


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_no_life_with_many_preemptions_breaks_a_rule(max_in_flight: int) -> None:
    """The engine's own admission avoids what happens here all the time."""
    seen = live(max_in_flight, reckless)
    lag = SEEN_WITH_LAG | SEEN_UNDER_PRESSURE_WITH_LAG if max_in_flight > 1 else set()
    assert ALWAYS_SEEN | SEEN_UNDER_PRESSURE | lag <= seen
