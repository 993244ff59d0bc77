"""Preemption one rule at a time; lives in which everything happens at once are in test_scheduler_properties.py."""

from engine.scheduler import OUT_OF_MEMORY_ERROR, Scheduler
from engine.sequence import Sequence, SequenceState
from engine.step_plan import PrefillChunk, StepPlan
from engine.types import Delta, Timing
from tests.engine.scheduler_life import reckless
from tests.engine.scheduling import EOS, commit_blocks, make_scheduler, make_sequence, must_schedule, tokens_of


def crowded(*sequences: Sequence, pages: int, max_step_positions: int = 16) -> Scheduler:
    """A scheduler whose rows, a page for each position, will not all find the pages they grow to."""
    scheduler = make_scheduler(pages=pages, page_size=1, max_step_positions=max_step_positions, admission=reckless)
    scheduler.add(sequences)
    return scheduler


def step(scheduler: Scheduler, now: float = 0.0) -> list[Delta]:
    """A step of the synchronous loop."""
    return commit_blocks(scheduler, must_schedule(scheduler, now), now=now)


def wait_for(scheduler: Scheduler, sequence: Sequence, now: float = 0.0) -> StepPlan:
    """The first plan that gives this sequence a row again."""
    plan = must_schedule(scheduler, now)
    while sequence not in plan.bound:
        commit_blocks(scheduler, plan)
        plan = must_schedule(scheduler, now)
    return plan


def two_in_need() -> tuple[Scheduler, Sequence, Sequence, StepPlan]:
    """Two sequences that hold all six pages and both need one more, with a step of both in flight."""
    first, second = make_sequence(1, 4, max_tokens=24), make_sequence(2, 4, max_tokens=24)
    scheduler = crowded(first, second, pages=6)
    step(scheduler)
    step(scheduler)
    flying = must_schedule(scheduler)
    assert flying.decode == [first, second]
    assert scheduler.schedule(1) is None, "no row has a page before the commit"
    scheduler.check_integrity()
    return scheduler, first, second, flying


def test_the_newest_is_sent_back_when_pages_run_out_and_computed_again() -> None:
    first, second, third = (make_sequence(key, 4, max_tokens=24) for key in (1, 2, 3))
    scheduler = crowded(first, second, third, pages=7)
    step(scheduler)
    step(scheduler)
    plan = must_schedule(scheduler)
    assert plan.decode == [first, second]
    assert (scheduler.preemptions, scheduler.waiting, third.position) == (1, 1, 0)
    commit_blocks(scheduler, plan)
    plan = wait_for(scheduler, third)
    assert (third.generated, len(tokens_of(third))) == (8, 12)
    assert PrefillChunk(third, 0, 2) in plan.prefill
    assert plan.decode_positions[plan.decode.index(third)] == 2


def test_lower_priority_is_sent_back_before_newer() -> None:
    low, high = make_sequence(1, 4, max_tokens=20, priority=1), make_sequence(2, 4, max_tokens=20)
    scheduler = crowded(low, pages=5)
    step(scheduler)
    scheduler.add([high])
    while not scheduler.preemptions:
        step(scheduler)
    assert (low.state, high.state) == (SequenceState.WAITING, SequenceState.DECODING)


def test_what_is_sent_back_waits_ahead_of_all_that_came_later() -> None:
    first, second, third = (make_sequence(key, 4, max_tokens=24) for key in (1, 2, 3))
    scheduler = crowded(first, second, pages=6)
    step(scheduler)
    scheduler.add([third])
    while not scheduler.preemptions:
        step(scheduler)
    plan = wait_for(scheduler, third)
    assert second.state is SequenceState.DECODING or second in plan.bound


def test_a_row_with_none_behind_it_sits_out_and_keeps_what_it_has() -> None:
    last, urgent = make_sequence(1, 4, max_tokens=24), make_sequence(2, 24, max_tokens=4, priority=-1)
    scheduler = crowded(last, pages=9, max_step_positions=5)
    step(scheduler)
    step(scheduler)
    scheduler.add([urgent])
    step(scheduler)
    plan = must_schedule(scheduler)
    assert plan.decode == [urgent]
    assert (last.state, len(last.pages), scheduler.preemptions) == (SequenceState.DECODING, 3, 0)
    commit_blocks(scheduler, plan)
    assert must_schedule(scheduler).decode == [last]


def test_pages_in_flight_come_back_at_the_commit() -> None:
    scheduler, first, second, flying = two_in_need()
    assert (second.state, len(second.pages)) == (SequenceState.PREEMPTED, 3)
    assert [delta.token_ids for delta in commit_blocks(scheduler, flying)] == [(50, 50, 50, 50)] * 2
    assert (second.state, second.row, second.pages) == (SequenceState.WAITING, None, [])
    assert (second.generated, len(tokens_of(second)), scheduler.preemptions) == (12, 16, 1)
    assert must_schedule(scheduler).decode == [first]


def test_a_preempted_sequence_may_end_with_the_step_in_flight() -> None:
    scheduler, _, _, flying = two_in_need()
    delta, _ = commit_blocks(scheduler, flying, [[50] * 4, [50, EOS, 50, 50]])
    assert (delta.token_ids, delta.finish_reason) == ((50, EOS), "stop")
    assert (scheduler.running, scheduler.waiting, scheduler.preemptions) == (1, 0, 0)


def test_a_preempted_sequence_may_fail_with_the_step_in_flight() -> None:
    scheduler, first, second, flying = two_in_need()
    results = scheduler.commit(flying, [[50] * 4, [0] * 4], [True, True], 0.0, failed=[second])
    scheduler.check_integrity()
    assert [(sequence.key, delta.finish_reason, delta.error) for sequence, delta in results] == [
        (2, "error", OUT_OF_MEMORY_ERROR),
        (1, None, None),
    ]
    assert (scheduler.running, scheduler.waiting, scheduler.preemptions) == (1, 0, 0)
    assert must_schedule(scheduler).decode == [first]


def test_a_preempted_sequence_is_aborted_like_any_other() -> None:
    scheduler, _, second, flying = two_in_need()
    assert scheduler.abort(2)
    scheduler.check_integrity()
    assert second.row is not None
    assert [delta.request_id for delta in commit_blocks(scheduler, flying)] == [1]
    assert second.row is None and (scheduler.running, scheduler.waiting) == (1, 0)


def test_nothing_is_preempted_while_enough_pages_are_about_to_come_back() -> None:
    ending, first, second = (make_sequence(key, 4, max_tokens=tokens) for key, tokens in ((1, 8), (2, 20), (3, 20)))
    scheduler = crowded(ending, first, second, pages=6)
    step(scheduler)
    flying = must_schedule(scheduler)
    assert ending in flying.decode and ending.position == ending.end_position
    assert scheduler.schedule(0) is None
    commit_blocks(scheduler, flying)
    assert must_schedule(scheduler).decode == [first, second]
    assert scheduler.preemptions == 0


def test_a_prompt_is_preempted_too_and_its_tail_is_forced_when_its_turn_comes_again() -> None:
    first = make_sequence(1, 4, max_tokens=40)
    second = make_sequence(2, 50, max_tokens=2, alignment="forced_tail", arrival=1.0)
    scheduler = crowded(first, second, pages=14, max_step_positions=5)
    step(scheduler, now=2.0)
    step(scheduler, now=2.0)
    assert second.state is SequenceState.PREFILLING and second.position == 8
    assert step(scheduler, now=2.0)[0].request_id == 1
    assert (second.state, scheduler.preemptions) == (SequenceState.WAITING, 1)
    plan = wait_for(scheduler, second, now=3.0)
    assert second.forced == (149, 150) and plan.prefill[0].start == 0
    commit_blocks(scheduler, plan)
    while not (deltas := step(scheduler, now=6.0)):
        pass
    timing = Timing(queue=1.0, prefill=4.0)
    assert deltas == [Delta(request_id=2, token_ids=(50, 50), finish_reason="length", timing=timing)]


def test_tokens_are_not_forced_again_after_the_first_block() -> None:
    first = make_sequence(1, 4, max_tokens=40)
    second = make_sequence(2, 6, max_tokens=30, alignment="forced_tail")
    scheduler = crowded(first, second, pages=10)
    _, delta = step(scheduler)
    assert delta.token_ids == (50, 50) and delta.timing is not None
    while not scheduler.preemptions:
        step(scheduler)
    plan = wait_for(scheduler, second)
    assert second.forced == () and tokens_of(second)[4:8] == [105, 106, 50, 50]
    assert second.generated == len(tokens_of(second)) - 6
    (delta,) = commit_blocks(scheduler, plan)
    assert delta.token_ids == (50, 50, 50, 50) and delta.timing is None
