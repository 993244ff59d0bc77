"""The prefix cache by itself and under a scheduler; lives in which everything happens are in the scheduler's tests."""

import random
from collections.abc import Callable

import pytest

from engine.admission import AdmissionRule, may_admit
from engine.page_pool import PagePool
from engine.prefix_cache import PrefixCache, sha256
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState
from engine.step_plan import PrefillChunk
from tests.engine.scheduler_life import SHAPES, SchedulerLife, reckless
from tests.engine.scheduling import commit_blocks, make_scheduler, make_sequence, must_schedule
from tests.engine.test_scheduler_properties import act

PAGE_TOKENS = 8
"""Tokens of a page in these tests: two blocks of four."""


def text(*pages: int, rest: int = 4) -> list[int]:
    """A prompt whose pages hold the numbers given, and what behind them is decoded by its row or fills no page."""
    return [number for number in pages for _ in range(PAGE_TOKENS)] + [9] * rest


def cache_of(pages: int = 8, digest: Callable[[bytes], bytes] = sha256) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(pages)
    return pool, PrefixCache(pool, 2, digest=digest)


def asking(cache: PrefixCache, *pages: int, salt: str = "", key: int = 2) -> Sequence:
    sequence = make_sequence(key, text(*pages), cache_salt=salt)
    cache.enroll(sequence)
    return sequence


def write(cache: PrefixCache, *pages: int, salt: str = "") -> Sequence:
    """A sequence that has taken and published its pages, in step 1."""
    sequence = asking(cache, *pages, salt=salt, key=1)
    sequence.pages = cache.allocate(len(pages))
    cache.publish(sequence, 0, 2 * len(pages), 1)
    cache.check_integrity()
    return sequence


def test_the_longest_equal_prefix_is_found() -> None:
    _, cache = cache_of()
    writer = write(cache, 1, 2, 3)
    for pages, found in [
        ((1, 2, 3), 3),
        ((1, 2, 3, 4), 3),
        ((1, 2, 4), 2),
        ((1,), 1),
        ((2, 3), 0),
        ((4, 2, 3), 0),
        ((), 0),
    ]:
        assert cache.find(asking(cache, *pages)) == writer.pages[:found]


def test_the_last_block_of_a_prompt_is_never_in_a_page_that_is_found() -> None:
    _, cache = cache_of()
    write(cache, 1, 2)
    assert len(cache.find(asking(cache, 1, 2))) == 2
    exact = make_sequence(3, text(1, 2, rest=0))
    cache.enroll(exact)
    assert len(cache.find(exact)) == 1


def test_salts_and_processes_share_nothing() -> None:
    _, cache = cache_of()
    writer = write(cache, 1, salt="a")
    assert cache.find(asking(cache, 1)) == cache.find(asking(cache, 1, salt="b")) == []
    assert cache.find(asking(cache, 1, salt="a")) == writer.pages
    assert asking(cache, 1, salt="a").page_keys == writer.page_keys
    assert asking(cache_of()[1], 1, salt="a").page_keys != writer.page_keys


def test_turned_off_it_computes_and_keeps_nothing() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, 2, enabled=False)
    writer = write(cache, 1, 2)
    pool.release(reversed(writer.pages))
    cache.count(10, 0)
    assert (writer.page_keys, pool.idle, cache.find(writer), cache.queried_tokens) == ([], [], [], 0)


@pytest.mark.parametrize(
    "digest", [lambda _: b"same", lambda data: sha256(data[-1:]), lambda data: sha256(data[-4 * PAGE_TOKENS :])]
)
def test_equal_keys_of_different_prefixes_serve_no_pages(digest: Callable[[bytes], bytes]) -> None:
    """All keys alike; keys of the last token alone; keys that know nothing of the page before."""
    _, cache = cache_of(digest=digest)
    writer = write(cache, 1, 2)
    other = asking(cache, 1 + 256, 2)
    assert set(other.page_keys) & set(writer.page_keys), "these keys are meant to collide"
    assert cache.find(other) == []
    assert cache.find(asking(cache, 1, 2, salt="other")) == []
    assert cache.find(asking(cache, 1, 2 + 256)) == cache.find(asking(cache, 1)) == writer.pages[:1]
    other.pages = cache.allocate(2)
    cache.publish(other, 0, 4, 2)
    cache.check_integrity()
    assert cache.find(asking(cache, 1)) == writer.pages[:1], "who came first keeps the key"


def test_equal_keys_of_equal_pages_behind_different_prefixes_serve_no_pages() -> None:
    _, cache = cache_of(digest=lambda data: sha256(data[-4 * PAGE_TOKENS :]))
    write(cache, 1, 2)
    other = write(cache, 3)
    asked = asking(cache, 3, 2)
    assert cache.find(asked) == other.pages
    asked.pages = other.pages + cache.allocate(1)
    cache.publish(asked, 2, 4, 2)
    cache.check_integrity()
    assert cache.find(asking(cache, 3, 2)) == other.pages


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_no_life_with_colliding_keys_breaks_a_rule(max_in_flight: int) -> None:
    """The device of these lives looks at the content of every page that a row reads."""
    for seed, shape in enumerate(SHAPES):
        rng = random.Random(seed)
        life = SchedulerLife(shape, max_in_flight, may_admit, digest=lambda data: bytes([sum(data) % 5]))
        for _ in range(200):
            act(life, rng)
        life.drain()


def test_a_chain_loses_its_tail_first_and_what_is_handed_out_is_not_found() -> None:
    pool, cache = cache_of(pages=4)
    writer = write(cache, 1, 2, 3)
    cache.confirm(1)
    pages = list(writer.pages)
    pool.release(reversed(pages))
    reader = asking(cache, 1, 2, 3)
    assert cache.find(reader) == pages
    for left in (3, 2, 1, 0):
        assert cache.find(reader) == pages[:left], "asked again and again, it sees what has gone"
        cache.check_integrity()
        if left:
            cache.allocate(2 if left == 3 else 1)


def test_what_was_found_grows_with_what_is_published() -> None:
    _, cache = cache_of()
    writer = asking(cache, 1, 2, 3, key=1)
    writer.pages = cache.allocate(3)
    reader = asking(cache, 1, 2, 3)
    assert cache.find(reader) == []
    cache.publish(writer, 0, 3, 1)
    assert cache.find(reader) == writer.pages[:1], "the second page is not whole yet"
    cache.publish(writer, 3, 6, 2)
    assert cache.find(reader) == writer.pages


def test_held_are_those_that_somebody_holds() -> None:
    pool, cache = cache_of()
    writer = write(cache, 1, 2, 3)
    pool.release(writer.pages[:0:-1])
    reader = asking(cache, 1, 2, 3)
    found = cache.find(reader)
    assert (len(found), cache.held(found)) == (3, 1)
    assert cache.take(reader, found) == 3 * PAGE_TOKENS
    assert cache.held(found) == 3


def test_padding_is_no_cached_token() -> None:
    _, cache = cache_of()
    sequence = make_sequence(1, [5] * (PAGE_TOKENS + 1))
    cache.enroll(sequence)
    sequence.pages = cache.allocate(1)
    cache.publish(sequence, 0, 2, 1)
    assert cache.take(sequence, cache.find(sequence)) == PAGE_TOKENS - 3


# --- Under a scheduler ---------------------------------------------------------------------------------------------


def sharing(
    *prompts: list[int], pages: int = 64, max_step_positions: int = 32, admission: AdmissionRule = may_admit
) -> tuple[Scheduler, list[Sequence]]:
    scheduler = make_scheduler(
        pages=pages, max_step_positions=max_step_positions, admission=admission, prefix_cache=True
    )
    sequences = [make_sequence(key, prompt, max_tokens=24) for key, prompt in enumerate(prompts)]
    scheduler.add(sequences)
    return scheduler, sequences


def test_requests_that_arrive_together_compute_their_prefix_once() -> None:
    scheduler, (first, second, third) = sharing(text(1, 2), text(1, 2, 3), text(1, 2))
    plan = must_schedule(scheduler)
    assert plan.prefill == [PrefillChunk(first, 0, 4), PrefillChunk(second, 4, 2)]
    assert plan.decode == [first, second, third], "a prompt that was all there has nothing to prefill"
    assert plan.decode_positions.tolist() == [4, 6, 4]
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    deltas = commit_blocks(scheduler, plan)
    assert [delta.cached_tokens for delta in deltas] == [0, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS]
    assert [delta.cached_tokens for delta in commit_blocks(scheduler, must_schedule(scheduler))] == [0, 0, 0]


def test_the_last_holder_leaves_pages_that_later_requests_find() -> None:
    scheduler, (first,) = sharing(text(1, 2))
    commit_blocks(scheduler, must_schedule(scheduler))
    pages = first.pages[:2]
    scheduler.abort(first.key)
    second = make_sequence(5, text(1, 2))
    scheduler.add([second])
    plan = must_schedule(scheduler)
    assert (second.pages[:2], plan.prefill) == (pages, [])


def test_admission_counts_the_pages_to_be_taken_only() -> None:
    prompt = text(*range(1, 7))
    scheduler, (first, second) = sharing(prompt, prompt, pages=14, max_step_positions=64)
    plan = must_schedule(scheduler)
    assert plan.bound == [first, second], "two prompts of seven pages would leave no headroom"


def test_who_shares_pages_that_were_not_written_begins_again() -> None:
    scheduler, (writer, reader, other) = sharing(text(1, 2), text(1, 2), text(3))
    plan = must_schedule(scheduler)
    assert reader in plan.decode
    results = dict(scheduler.commit(plan, [[50] * 4] * 3, [True] * 3, 0.0, failed=[writer]))
    scheduler.check_integrity()
    assert results[writer].finish_reason == "error" and results[other].token_ids == (50,) * 4
    assert reader not in results
    assert (reader.state, reader.generated, len(reader.blocks)) == (SequenceState.WAITING, 0, 5)
    plan = must_schedule(scheduler)
    assert plan.prefill == [PrefillChunk(reader, 0, 4)]
    delta = commit_blocks(scheduler, plan)[0]
    assert (delta.request_id, delta.token_ids, delta.cached_tokens) == (1, (50,) * 4, 0)


def test_a_reader_in_the_next_step_keeps_its_row_until_that_has_landed_and_gains_nothing() -> None:
    scheduler, (writer, reader) = sharing(text(1, 2), text(1, 2), max_step_positions=5)
    first = must_schedule(scheduler)
    second = must_schedule(scheduler)
    assert (first.bound, second.bound) == ([writer], [reader])
    scheduler.commit(first, [[50] * 4] * len(first.decode), [True] * len(first.decode), 0.0, failed=[writer])
    scheduler.check_integrity()
    assert (reader.state, reader.row is None) == (SequenceState.SPOILED, False)
    assert commit_blocks(scheduler, second) == []
    assert scheduler.state_of(reader.key) is SequenceState.WAITING
    assert must_schedule(scheduler).prefill == [PrefillChunk(reader, 0, 4)]


def test_a_reader_that_is_aborted_meanwhile_is_gone() -> None:
    scheduler, (writer, reader) = sharing(text(1, 2), text(1, 2), max_step_positions=5)
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    scheduler.commit(first, [[50] * 4] * len(first.decode), [True] * len(first.decode), 0.0, failed=[writer])
    assert reader.state is SequenceState.SPOILED
    assert scheduler.abort(reader.key)
    scheduler.check_integrity()
    assert commit_blocks(scheduler, second) == []
    assert not scheduler.has_work


def test_what_an_aborted_writer_did_not_write_is_not_found_either() -> None:
    scheduler, (writer, reader) = sharing(text(1, 2), text(1, 2))
    plan = must_schedule(scheduler)
    assert scheduler.abort(writer.key)
    scheduler.commit(plan, [[50] * 4] * 2, [True] * 2, 0.0, failed=[writer])
    scheduler.check_integrity()
    assert reader.state is SequenceState.WAITING
    assert must_schedule(scheduler).prefill == [PrefillChunk(reader, 0, 4)]


def test_an_aborted_writer_whose_step_runs_has_written_all_the_same() -> None:
    scheduler, (writer, reader) = sharing(text(1, 2), text(1, 2))
    plan = must_schedule(scheduler)
    assert scheduler.abort(writer.key)
    deltas = commit_blocks(scheduler, plan)
    assert [(delta.request_id, delta.token_ids) for delta in deltas] == [(reader.key, (50,) * 4)]


def test_a_preempted_sequence_finds_what_it_wrote() -> None:
    scheduler, (first, second) = sharing(text(1), text(2), pages=6, admission=reckless)
    while not scheduler.preemptions:
        commit_blocks(scheduler, must_schedule(scheduler))
    assert (second.state, second.generated, len(second.blocks)) == (SequenceState.WAITING, 16, 7)
    scheduler.abort(first.key)
    plan = must_schedule(scheduler)
    # Of its three pages, one of its prompt and two of its answer, the first sequence took the last.
    assert plan.prefill == [PrefillChunk(second, 4, 2)]
