import random
from collections import deque
from typing import NamedTuple

import pytest

from engine.admission import AdmissionRule, Occupancy, may_admit
from engine.page_pool import PagePool
from engine.scheduler import Scheduler
from engine.step_budget import StepBudget
from engine.step_plan import StepPlan
from tests.engine.scheduling import BLOCK_LENGTH, EOS, make_sequence


def test_what_fits_whatever_happens_is_admitted() -> None:
    occupancy = Occupancy(capacity=20, free=8, running=3, running_worst=14, prompt=5, worst=6)
    assert may_admit(occupancy)
    assert not may_admit(occupancy._replace(worst=7))
    assert may_admit(Occupancy(capacity=20, free=20, running=0, running_worst=0, prompt=19, worst=20))


@pytest.mark.parametrize(("prompt", "running", "free"), [(5, 2, 10), (5, 4, 10), (5, 5, 11), (1, 9, 11)])
def test_else_as_much_as_the_prompt_takes_stays_free_and_a_page_for_each_row(
    prompt: int, running: int, free: int
) -> None:
    occupancy = Occupancy(capacity=20, free=free, running=running, running_worst=40, prompt=prompt, worst=9)
    assert may_admit(occupancy)
    assert not may_admit(occupancy._replace(free=free - 1))


class Load(NamedTuple):
    """Requests of so many blocks (ranges of prompt and answer) for a pool of 256 positions."""

    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    max_recomputed: float
    """Share of all positions."""


LOADS = {
    "mixed": Load(200, (1, 20), (1, 60), 0.22),
    "short prompts, long answers": Load(200, (2, 4), (60, 60), 0.34),
    "few long ones": Load(100, (40, 100), (40, 100), 0.2),
}


class Course(NamedTuple):
    """What a simulation took."""

    steps: int
    preemptions: int
    recomputed: float


def simulate(load: Load, lag: int, admission: AdmissionRule) -> Course:
    """All requests at once, until the last has ended; each asks for twice the tokens that its answer has."""
    rng = random.Random(1)
    scheduler = Scheduler(
        pool=PagePool(64),
        max_rows=32,
        max_waiting=load.requests,
        page_size=4,
        budget=StepBudget(64),
        block_length=BLOCK_LENGTH,
        eos_token_id=EOS,
        admission=admission,
    )
    blocks_of = {}
    for key in range(load.requests):
        blocks_of[key] = rng.randint(*load.answer)
        max_tokens = min(2 * blocks_of[key], 150) * BLOCK_LENGTH
        scheduler.add([make_sequence(key, rng.randint(*load.prompt) * BLOCK_LENGTH, max_tokens=max_tokens)])
    reached = dict.fromkeys(blocks_of, 0)
    flights: deque[StepPlan] = deque()
    steps = positions = recomputed = 0
    while scheduler.has_work:
        while len(flights) <= lag and (plan := scheduler.schedule(0)) is not None:
            flights.append(plan)
            steps += 1
            decodes = zip(plan.decode, plan.decode_positions, strict=True)
            for sequence, start, length in [*plan.prefill, *((s, position, 1) for s, position in decodes)]:
                key = sequence.request.request_id
                positions += length
                recomputed += max(min(start + length, reached[key]) - start, 0)
                reached[key] = max(reached[key], start + length)
        plan = flights.popleft()
        last = [s.generated // BLOCK_LENGTH + 1 == blocks_of[s.request.request_id] for s in plan.decode]
        scheduler.commit(plan, [[50, 50, 50, EOS if end else 50] for end in last], [True] * len(last), 0)
    return Course(steps, scheduler.preemptions, recomputed / positions)


def worst_case(pages: Occupancy) -> bool:
    """No preemption, ever: what admission would be without them."""
    return pages.running_worst + pages.worst <= pages.capacity


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_little_is_recomputed_and_all_is_done_sooner_than_without_preemption(load: Load, lag: int) -> None:
    course = simulate(load, lag, may_admit)
    assert course.preemptions > 0
    assert course.recomputed <= load.max_recomputed
    without = simulate(load, lag, worst_case)
    assert (without.preemptions, without.recomputed) == (0, 0)
    assert course.steps < 0.9 * without.steps


@pytest.mark.parametrize(
    ("load", "rule"),
    [
        ("short prompts, long answers", lambda pages: pages.free >= 2 * pages.prompt),
        ("few long ones", lambda pages: pages.free > pages.prompt + pages.running),
    ],
)
def test_neither_half_of_the_headroom_would_do(load: str, rule: AdmissionRule) -> None:
    def half(pages: Occupancy) -> bool:
        return worst_case(pages) or rule(pages)

    assert simulate(LOADS[load], 0, half).recomputed > LOADS[load].max_recomputed
