"""Requests whose tokens are known at every moment, as a worker records them and as they are counted."""

import heapq
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from server.bench.figures import figures
from server.bench.http_client import HttpConnection
from server.bench.messages import Begin
from server.bench.worker import Tally, Usage

SPEED = 160.0
"""Tokens a second of each answer that is being made."""
BLOCK = 4
LENGTHS = range(1024, 3073)
PROMPT = 128


class Asked(NamedTuple):
    """A request that waits until `started`; `tokens` is 0 if it fails at its end."""

    began: float
    started: float
    ended: float
    tokens: int


class Heard(HttpConnection):
    """A connection on which text came at these moments."""

    def __init__(self, deliveries: list[float]) -> None:
        super().__init__()
        self._deliveries = deliveries


def closed_loop(number: int, until: float, *, rows: int, lengths: Sequence[int] = LENGTHS) -> list[Asked]:
    """As many open, of which as many as there are rows are made at a time, in the order in which they came."""
    rng = random.Random(7)
    places, free, asked = [0.0] * number, [0.0] * rows, []
    while places[0] < until:
        began, tokens = places[0], rng.choice(lengths)
        started = max(began, free[0])
        ended = started + tokens / SPEED
        heapq.heapreplace(free, ended)
        heapq.heapreplace(places, ended)
        asked.append(Asked(began, started, ended, tokens))
    return asked


def poisson(rate: float, until: float) -> list[Asked]:
    """Requests that are made from when they come on."""
    rng, asked, began = random.Random(7), [], 0.0
    while (began := began + rng.expovariate(rate)) < until:
        tokens = rng.choice(LENGTHS)
        asked.append(Asked(began, began, began + tokens / SPEED, tokens))
    return asked


def deliveries(one: Asked) -> list[float]:
    blocks = math.ceil(one.tokens / BLOCK)
    return [one.started + (place + 1) / blocks * (one.ended - one.started) for place in range(blocks)]


def counted(asked: Sequence[Asked], begin: Begin, *, streamed: bool) -> dict[str, Any]:
    """The figures of two workers that share the requests."""
    now = 0.0
    tallies = [Tally(begin, clock=lambda: now) for _ in range(2)]
    for number, one in enumerate(asked):
        tally, now = tallies[number % 2], one.ended
        if one.began >= begin.end:
            continue
        request = tally.opened(one.began)
        came = deliveries(one) if streamed else []
        if one.ended >= begin.end + 0.1:
            request.connection = Heard(came)
        elif one.tokens:
            tally.answered(request, came, Usage(PROMPT, one.tokens), streamed=streamed)
        else:
            tally.failed(request, "timeout")
    records = [tally.records() for tally in tallies]
    return figures(records, start=begin.measure_from, end=begin.end, service_level=None)


def made(asked: Sequence[Asked], begin: Begin) -> float:
    """Tokens a second that were made in the measured time, of requests that are answered."""
    inside = (max(0.0, min(one.ended, begin.end) - max(one.started, begin.measure_from)) for one in asked if one.tokens)
    return sum(inside) * SPEED / (begin.end - begin.measure_from)


def by_ends(asked: Sequence[Asked], begin: Begin) -> float:
    """Tokens a second of the answers that end in the measured time."""
    tokens = sum(one.tokens for one in asked if begin.measure_from <= one.ended < begin.end)
    return tokens / (begin.end - begin.measure_from)


SHORT = Begin(0, 10, 18)


@pytest.mark.parametrize("streamed", [False, True])
def test_requests_that_began_together_are_not_counted_too_often(streamed: bool) -> None:
    asked = closed_loop(512, 30, rows=512)
    row = counted(asked, SHORT, streamed=streamed)
    assert made(asked, SHORT) == pytest.approx(512 * SPEED)
    assert by_ends(asked, SHORT) > 1.1 * 512 * SPEED
    assert row["tok_s"] == pytest.approx(512 * SPEED, rel=0.02)
    assert row["prompt_tok_s"] == pytest.approx(512 * SPEED * PROMPT / 2048, rel=0.1)
    assert row["requests_s"] * 8 == sum(10 <= one.ended < 18 for one in asked)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("begin", [Begin(0, 0, 4), Begin(0, 6.5, 7.5), Begin(0, 3, 20), Begin(0, 20, 20.5)])
def test_any_time_gives_the_same_rate(begin: Begin, streamed: bool) -> None:
    asked = closed_loop(256, 30, rows=256, lengths=range(200, 1400))
    assert counted(asked, begin, streamed=streamed)["tok_s"] == pytest.approx(256 * SPEED, rel=0.02)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_long_time_agrees_with_counting_ends(streamed: bool) -> None:
    asked, begin = closed_loop(32, 700, rows=32), Begin(0, 60, 660)
    row = counted(asked, begin, streamed=streamed)
    assert row["tok_s"] == pytest.approx(by_ends(asked, begin), rel=0.01)
    assert row["prompt_tok_s"] == pytest.approx(row["requests_s"] * PROMPT, rel=0.01)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("begin", [SHORT, Begin(0, 40, 43), Begin(0, 30, 70)])
def test_requests_that_come_as_they_like(begin: Begin, streamed: bool) -> None:
    asked = poisson(20, 90)
    assert counted(asked, begin, streamed=streamed)["tok_s"] == pytest.approx(made(asked, begin), rel=0.02)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("seconds", [4, 8, 30])
def test_requests_that_wait_first_make_fewer_tokens_a_second(seconds: float, streamed: bool) -> None:
    asked, begin = closed_loop(1024, 160, rows=512), Begin(0, 100, 100 + seconds)
    assert counted(asked, begin, streamed=streamed)["tok_s"] == pytest.approx(512 * SPEED, rel=0.03)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("patience", [15, 100])
def test_requests_that_will_fail_do_not_count_as_others_that_are_open(patience: int, streamed: bool) -> None:
    # Half of the places are never answered, and ask again when they have lost their patience.
    good = closed_loop(128, 60, rows=128, lengths=range(100, 800))
    offsets = [-place / 128 * patience for place in range(128)]
    stuck = [Asked(at + turn, at + turn, at + turn + patience, 0) for at in offsets for turn in range(0, 160, patience)]
    asked, begin = [*good, *stuck], Begin(0, 20, 32)
    row = counted(asked, begin, streamed=streamed)
    assert row["failures"] == sum(20 <= one.ended < 32 for one in stuck) > 10
    assert row["tok_s"] == pytest.approx(128 * SPEED, rel=0.03)


@pytest.mark.parametrize("streamed", [False, True])
def test_what_ended_before_speaks_for_a_time_in_which_nothing_ends(streamed: bool) -> None:
    asked, begin = closed_loop(16, 30, rows=16, lengths=[1600]), Begin(0, 11, 19)
    row = counted(asked, begin, streamed=streamed)
    assert (row["answers"], row["unfinished"]) == (0, 16)
    assert row["tok_s"] == pytest.approx(16 * SPEED, rel=0.01)
    assert row["prompt_tok_s"] == pytest.approx(16 * SPEED * PROMPT / 1600, rel=0.01)


def test_open_streams_count_by_what_came_also_if_they_are_slower_than_those_before() -> None:
    now = 0.0
    tally = Tally(Begin(0, 10, 20), clock=lambda: now)
    quick, slow = tally.opened(0.0), tally.opened(1.0)
    now = 2.0
    tally.answered(quick, [1.0, 2.0], Usage(4, 8), streamed=True)
    slow.connection = Heard([5.0, 11.0, 13.0, 19.0, 20.01])
    assert figures([tally.records()], start=10, end=20, service_level=None)["tokens"] == 12


def test_nothing_is_known_of_requests_of_which_none_has_ended() -> None:
    asked = closed_loop(16, 30, rows=16, lengths=[3200])
    assert counted(asked, Begin(0, 1, 9), streamed=False)["tok_s"] == 0.0


def test_streams_without_text_are_spread_evenly() -> None:
    now = 0.0
    tally = Tally(Begin(0, 2, 6), clock=lambda: now)
    request = tally.opened(1.0)
    now = 5.0
    tally.answered(request, [], Usage(4, 8), streamed=True)
    row = figures([tally.records()], start=2, end=6, service_level=None)
    assert (row["tokens"], row["prompt_tokens"]) == (6, 3)
