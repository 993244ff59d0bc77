"""What a worker takes for an answer, and how it counts."""

import asyncio
import math
import time
from array import array

import pytest

from server.bench.http_client import Response
from server.bench.messages import Begin
from server.bench.worker import FailedError, Tally, Usage, read_usage

TEXT = b'data: {"choices":[{"text":"a"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7,"total_tokens":10}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_the_usage_of_a_stream_is_in_its_last_event() -> None:
    assert read_usage(Response(200, TEXT + TEXT + USAGE + DONE), streamed=True) == Usage(3, 7)
    assert read_usage(Response(200, USAGE + DONE), streamed=True) == Usage(3, 7)
    continuous = TEXT.replace(b"null", b'{"prompt_tokens":3,"completion_tokens":4}')
    assert read_usage(Response(200, continuous + USAGE + DONE), streamed=True) == Usage(3, 7)


def test_a_text_that_looks_like_an_event_is_none() -> None:
    tricky = b'data: {"choices":[{"text":"\\ndata: {"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    assert read_usage(Response(200, TEXT + tricky + DONE), streamed=True) == Usage(1, 2)


def test_the_usage_of_a_whole_answer() -> None:
    assert read_usage(Response(200, USAGE.removeprefix(b"data: ")), streamed=False) == Usage(3, 7)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (429, b"", "status 429"),
        (500, USAGE + DONE, "status 500"),
        (200, TEXT + USAGE, "stream without its end"),
        (200, b"", "stream without its end"),
        (200, DONE, "answer that is not understood"),
        (200, TEXT + b"data: {\n\n" + DONE, "answer that is not understood"),
        (200, TEXT + DONE, "answer without usage"),
        (200, TEXT + b'data: {"error":{"message":"gone"}}\n\n' + DONE, "error within the answer"),
    ],
)
def test_what_is_no_answer(status: int, body: bytes, kind: str) -> None:
    with pytest.raises(FailedError) as failed:
        read_usage(Response(status, body), streamed=True)
    assert str(failed.value) == kind


def floats(data: bytes) -> list[float]:
    return array("d", data).tolist()


def test_only_what_ends_in_the_measured_time_is_recorded() -> None:
    now = time.monotonic()
    early, measured = Tally(Begin(now, now + 60, now + 90)), Tally(Begin(now, now, now + 60))
    for tally in (early, measured):
        tally.answered(tally.opened(now), [now + 1, now + 1.5, now + 3], Usage(2, 9), streamed=True)
        tally.failed(tally.opened(now), "timeout")
        assert (tally.answers, tally.failures, tally.tokens) == (1, 1, 9)
    assert floats(early.records().ended) == []
    assert early.records().errors == {}
    records = measured.records()
    assert floats(records.first_token) == pytest.approx([1.0])
    assert floats(records.last_token) == pytest.approx([2.0])
    assert floats(records.gaps) == pytest.approx([0.5, 1.5])
    assert (floats(records.prompt_tokens), floats(records.output_tokens)) == ([2.0], [9.0])
    assert records.errors == {"timeout": 1}


def test_what_began_before_the_end_and_ended_behind_it_was_open_then() -> None:
    now = 0.0
    tally = Tally(Begin(0, 10, 20), clock=lambda: now)
    requests = [tally.opened(began) for began in (5.0, 12.0, 19.0, 20.5)]
    now = 20.1
    tally.answered(requests[0], [9.0, 11.0, 19.0, 20.1], Usage(2, 16), streamed=True)
    tally.failed(requests[1], "timeout")
    records = tally.records()
    assert (floats(records.ended), records.errors) == ([], {})
    assert (records.unfinished, records.open_seconds, records.open_deliveries) == (3, 10.0 + 8.0 + 1.0, 2)


async def test_a_whole_answer_has_one_moment() -> None:
    now = time.monotonic()
    tally = Tally(Begin(now, now, now + 60))
    await asyncio.sleep(0.01)
    tally.answered(tally.opened(now), [time.monotonic()], Usage(2, 9), streamed=False)
    records = tally.records()
    assert math.isnan(floats(records.first_token)[0])
    assert floats(records.gaps) == []
    assert 0.01 <= floats(records.end_to_end)[0] < 5
