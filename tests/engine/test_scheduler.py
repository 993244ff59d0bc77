import pytest

from engine.scheduler import NON_FINITE_ERROR, QueueFullError
from engine.sequence import SequenceState
from engine.step_plan import PrefillChunk
from engine.types import Delta, InvalidRequestError, SamplingParams, Timing
from tests.engine.scheduling import EOS, commit_blocks, make_scheduler, make_sequence, must_schedule, tokens_of


def test_a_short_prompt_decodes_in_its_first_step() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1, 4, max_tokens=8)
    scheduler.add([sequence])
    plan = must_schedule(scheduler)
    assert plan.bound == plan.decode == [sequence] and plan.prefill == []
    assert plan.decode_positions.tolist() == [0] and plan.page_entries.tolist() == [[0, 0, 1]]
    assert commit_blocks(scheduler, plan)[0].token_ids == (50, 50, 50, 50)


def test_a_prompt_is_prefilled_and_decoded_in_one_step_where_the_budget_allows() -> None:
    scheduler = make_scheduler(max_step_positions=5)
    sequence = make_sequence(1, 20)
    scheduler.add([sequence])
    plan = must_schedule(scheduler)
    assert plan.prefill == [PrefillChunk(sequence, 0, 4)]
    assert plan.decode == [sequence] and plan.decode_positions.tolist() == [4]
    assert plan.page_entries.tolist() == [[0, 0, 1], [0, 1, 2], [0, 2, 3]]
    assert plan.positions == 5


def test_the_first_decode_waits_for_the_next_step_where_the_budget_is_spent() -> None:
    scheduler = make_scheduler(max_step_positions=5)
    sequence = make_sequence(1, 24)
    scheduler.add([sequence])
    plan = must_schedule(scheduler)
    assert plan.prefill == [PrefillChunk(sequence, 0, 5)] and plan.decode == []
    assert commit_blocks(scheduler, plan) == []
    plan = must_schedule(scheduler)
    assert (plan.prefill, plan.decode, plan.decode_positions.tolist(), plan.bound) == ([], [sequence], [5], [])


def test_attention_to_a_long_prompt_is_paid_for() -> None:
    # At 10 positions of context, attention costs as much as the rest: chunks become shorter, and one that fits ends.
    scheduler = make_scheduler(max_step_positions=20, attention_positions=10)
    scheduler.add([make_sequence(1, 4 * 31)])
    chunks: list[tuple[int, int]] = []
    while scheduler.has_work:
        plan = must_schedule(scheduler)
        chunks += [(chunk.start, chunk.length) for chunk in plan.prefill]
        commit_blocks(scheduler, plan)
    assert chunks == [(0, 12), (12, 7), (19, 6), (25, 5)]


def test_decoding_rows_come_first_then_started_prompts_then_new_ones() -> None:
    scheduler = make_scheduler(max_step_positions=6)
    first, second, third = make_sequence(1, 4), make_sequence(2, 40), make_sequence(3, 4)
    scheduler.add([first, second, third])
    plan = must_schedule(scheduler)
    assert plan.decode == [first] and plan.prefill == [PrefillChunk(second, 0, 5)]
    commit_blocks(scheduler, plan)
    plan = must_schedule(scheduler)
    # Position 9 of the second prompt is its first decode, which the budget of 6 has room for only now.
    assert plan.prefill == [PrefillChunk(second, 5, 4)]
    assert plan.decode == [first, second] and plan.decode_positions.tolist() == [1, 9]
    commit_blocks(scheduler, plan)
    plan = must_schedule(scheduler)
    assert plan.decode == [second, third] and plan.bound == [third]


def test_smaller_priority_is_admitted_first_and_arrival_decides_among_equals() -> None:
    scheduler = make_scheduler(max_rows=2)
    scheduler.add([make_sequence(1, priority=1), make_sequence(2), make_sequence(3, priority=-1)])
    assert [sequence.key for sequence in must_schedule(scheduler).bound] == [3, 2]


def test_a_head_that_does_not_fit_is_not_passed_by() -> None:
    # Pages of 2 positions; 10 blocks need 5 pages, all there are, and the third request would fit beside the first.
    scheduler = make_scheduler(pages=5)
    scheduler.add(
        [make_sequence(1, 4, max_tokens=16), make_sequence(2, 40, max_tokens=4), make_sequence(3, 4, max_tokens=4)]
    )
    plan = must_schedule(scheduler)
    assert [sequence.key for sequence in plan.bound] == [1]
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    scheduler.abort(1)
    commit_blocks(scheduler, plan)
    assert [sequence.key for sequence in must_schedule(scheduler).bound] == [2]


def test_pages_of_the_prompt_are_taken_at_once_and_others_as_a_row_grows() -> None:
    scheduler = make_scheduler(pages=8)
    sequence = make_sequence(1, 12, max_tokens=32)
    scheduler.add([sequence])
    held = []
    while scheduler.has_work:
        plan = must_schedule(scheduler)
        held.append(len(sequence.pages))
        commit_blocks(scheduler, plan)
    assert held == [2, 2, 3, 3, 4, 4, 5, 5]


def test_pages_of_rows_that_grow_and_of_prompts_go_with_one_step() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_sequence(1, 4, max_tokens=40)])
    for _ in range(2):
        commit_blocks(scheduler, must_schedule(scheduler))
    scheduler.add([make_sequence(2, 12), make_sequence(3, 4)])
    plan = must_schedule(scheduler)
    assert plan.page_entries.tolist() == [[0, 1, 2], [1, 0, 3], [1, 1, 4], [2, 0, 5]]


def test_a_request_that_the_pool_could_never_hold_is_invalid() -> None:
    scheduler = make_scheduler(pages=5)
    with pytest.raises(InvalidRequestError, match="need 6 pages of KV cache, and the engine has 5") as caught:
        scheduler.add([make_sequence(1), make_sequence(2, 4, max_tokens=44)])
    assert caught.value.param == "max_tokens"
    assert not scheduler.has_work


def test_the_queue_takes_a_group_whole_or_not_at_all() -> None:
    scheduler = make_scheduler(max_rows=2, max_waiting=3)
    scheduler.add([make_sequence(key) for key in range(4)])
    with pytest.raises(QueueFullError, match="4 requests wait already, and at most 3 may"):
        scheduler.add([make_sequence(4), make_sequence(5)])
    assert scheduler.waiting == 4
    scheduler.add([make_sequence(4)])
    must_schedule(scheduler)
    assert (scheduler.running, scheduler.waiting) == (2, 3)
    with pytest.raises(QueueFullError):
        scheduler.add([make_sequence(6)])


def test_a_key_that_is_open_is_refused_and_a_finished_one_is_not() -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match="open already"):
        scheduler.add([make_sequence(1), make_sequence(1)])
    scheduler.add([make_sequence(1, max_tokens=4)])
    with pytest.raises(InvalidRequestError) as caught:
        scheduler.add([make_sequence(1)])
    assert caught.value.param == "request_id"
    commit_blocks(scheduler, must_schedule(scheduler))
    scheduler.add([make_sequence(1)])
    assert scheduler.waiting == 1


def test_no_step_is_planned_past_max_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_sequence(1, 4, max_tokens=6)])
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    assert scheduler.schedule(0) is None
    assert scheduler.has_work and scheduler.running == 1
    assert [len(delta.token_ids) for delta in commit_blocks(scheduler, first) + commit_blocks(scheduler, second)] == [
        4,
        2,
    ]
    assert not scheduler.has_work and scheduler.schedule(0) is None


def test_a_row_that_met_eos_keeps_its_pages_until_the_step_in_flight_is_committed() -> None:
    scheduler = make_scheduler(max_rows=1)
    sequence, other = make_sequence(1, 4, max_tokens=40), make_sequence(2)
    scheduler.add([sequence, other])
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    assert commit_blocks(scheduler, first, [[7, EOS, 8, 9]]) == [
        Delta(request_id=1, token_ids=(7, EOS), finish_reason="stop", timing=Timing(queue=0, prefill=0))
    ]
    assert sequence.state is SequenceState.FINISHED and sequence.row == 0 and sequence.pages
    assert scheduler.schedule(0) is None, "the row was given away while a step in flight writes to it"
    assert commit_blocks(scheduler, second) == []
    assert sequence.row is None and not sequence.pages
    assert must_schedule(scheduler).bound == [other]


@pytest.mark.parametrize("place", range(4))
def test_a_row_of_many_ends_at_eos_alone(place: int) -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(key, max_tokens=40) for key in range(3)]
    scheduler.add(sequences)
    commit_blocks(scheduler, must_schedule(scheduler))
    ended = [50] * 4
    ended[place] = EOS
    deltas = commit_blocks(scheduler, must_schedule(scheduler), [[50] * 4, ended, [50] * 4])
    assert [(delta.request_id, len(delta.token_ids)) for delta in deltas] == [(1, place + 1), (0, 4), (2, 4)]
    assert [delta.finish_reason for delta in deltas] == ["stop", None, None]
    assert [sequence.generated for sequence in sequences] == [8, 4 + place + 1, 8]


def test_a_forced_tail_is_neither_streamed_nor_counted_nor_a_stop() -> None:
    scheduler = make_scheduler()
    params = SamplingParams(max_tokens=6, stop_token_ids=(105,), min_tokens=0)
    sequence = make_sequence(1, [101, 102, 103, 104, 105, EOS], params=params, alignment="forced_tail")
    scheduler.add([sequence])
    first = must_schedule(scheduler)
    assert [delta.token_ids for delta in commit_blocks(scheduler, first, [[105, EOS, 1, 2]])] == [(1, 2)]
    assert tokens_of(sequence) == [101, 102, 103, 104, 105, EOS, 1, 2]
    (delta,) = commit_blocks(scheduler, must_schedule(scheduler), [[3, 4, 5, 6]])
    assert (delta.token_ids, delta.finish_reason, delta.timing) == ((3, 4, 5, 6), "length", None)
    assert not scheduler.has_work


def test_rows_that_begin_in_one_step_gain_their_own_tokens() -> None:
    scheduler = make_scheduler()
    prompts, limits = ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]), (9, 9, 9, 2)
    whole, one_forced, three_forced, ending = sequences = [
        make_sequence(key, prompt, max_tokens=limit, alignment="forced_tail")
        for key, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    scheduler.add(sequences)
    deltas = commit_blocks(
        scheduler, must_schedule(scheduler), [[11, 12, 13, 14], [5, 22, 23, 24], [5, 6, 7, 34], [41, 42, 43, 44]]
    )
    assert [delta.token_ids for delta in deltas] == [(11, 12, 13, 14), (22, 23, 24), (34,), (41, 42)]
    assert [sequence.generated for sequence in sequences] == [4, 3, 1, 2]
    assert tokens_of(whole) == [1, 2, 3, 4, 11, 12, 13, 14]
    assert tokens_of(one_forced) == [1, 2, 3, 4, 5, 22, 23, 24]
    assert tokens_of(three_forced) == [1, 2, 3, 4, 5, 6, 7, 34]
    assert ending.row is None and deltas[3].finish_reason == "length"


def test_a_row_with_non_finite_logits_fails_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_sequence(1), make_sequence(2)])
    plan = must_schedule(scheduler)
    bad, good = (delta for _, delta in scheduler.commit(plan, [[0] * 4, [5] * 4], [False, True], 0.0))
    assert bad == Delta(request_id=1, finish_reason="error", error=NON_FINITE_ERROR)
    assert good.token_ids == (5, 5, 5, 5) and good.error is None
    assert scheduler.running == 1


def test_the_first_delta_says_where_the_time_went() -> None:
    scheduler = make_scheduler(max_step_positions=5)
    scheduler.add([make_sequence(1, 24, arrival=1.0)])
    assert commit_blocks(scheduler, must_schedule(scheduler, 3.0), now=3.5) == []
    (first,) = commit_blocks(scheduler, must_schedule(scheduler, 4.0), now=7.0)
    (second,) = commit_blocks(scheduler, must_schedule(scheduler, 7.0), now=8.0)
    assert first.timing == Timing(queue=2.0, prefill=4.0)
    assert second.timing is None


def test_aborting_what_waits_or_idles_frees_at_once() -> None:
    scheduler = make_scheduler(max_rows=1)
    running, waiting = make_sequence(1), make_sequence(2)
    scheduler.add([running, waiting])
    commit_blocks(scheduler, must_schedule(scheduler))
    assert scheduler.abort(2) and scheduler.waiting == 0
    assert scheduler.abort(1) and scheduler.running == 0
    scheduler.check_integrity()
    assert not scheduler.has_work and scheduler.schedule(0) is None
    assert not scheduler.abort(1) and not scheduler.abort(3)


def test_aborting_a_prompt_in_flight_frees_its_row_at_the_commit() -> None:
    scheduler = make_scheduler(max_step_positions=5)
    scheduler.add([make_sequence(1, 40)])
    plan = must_schedule(scheduler)
    assert scheduler.abort(1)
    scheduler.check_integrity()
    assert scheduler.running == 1 and not scheduler.abort(1)
    assert commit_blocks(scheduler, plan) == []
    assert scheduler.running == 0


def test_of_the_prompts_of_one_step_those_alone_that_have_left_lose_their_rows() -> None:
    scheduler = make_scheduler(max_step_positions=9)
    going_on, *leaving = sequences = [make_sequence(key, 12) for key in range(3)]
    scheduler.add(sequences)
    plan = must_schedule(scheduler)
    assert [chunk.sequence for chunk in plan.prefill] == sequences
    for sequence in leaving:
        scheduler.abort(sequence.key)
    (delta,) = commit_blocks(scheduler, plan)
    assert delta.request_id == going_on.key
    assert [(sequence.row is None, sequence.in_flight) for sequence in sequences] == [(False, 0), (True, 0), (True, 0)]


def test_a_sequence_that_is_aborted_in_flight_gains_nothing() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1)
    scheduler.add([sequence])
    plan = must_schedule(scheduler)
    scheduler.abort(1)
    assert commit_blocks(scheduler, plan) == []
    assert sequence.generated == 0 and tokens_of(sequence) == [101, 102, 103, 104]


def test_steps_are_committed_once_and_in_order() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_sequence(1)])
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    with pytest.raises(ValueError, match="in the order"):
        scheduler.commit(second, [[5] * 4], [True], 0)
    commit_blocks(scheduler, first)
    with pytest.raises(ValueError, match="in the order"):
        scheduler.commit(first, [[5] * 4], [True], 0)


def test_a_result_of_the_wrong_size_changes_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_sequence(1)])
    plan = must_schedule(scheduler)
    with pytest.raises(ValueError, match="1 rows decoded, but 2 blocks and 1 flags came"):
        scheduler.commit(plan, [[5] * 4] * 2, [True], 0)
    assert len(commit_blocks(scheduler, plan)) == 1


def test_a_budget_that_a_full_batch_would_use_up_is_refused() -> None:
    with pytest.raises(ValueError, match="max_step_positions 4 has to exceed max_rows 4"):
        make_scheduler(max_rows=4, max_step_positions=4)
