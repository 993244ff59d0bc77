"""A client that goes away leaves nothing at the engine, whenever it goes."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Scope

from server.disconnect import ClientGoneError, noticing, unless_disconnected
from tests.server.fakes import FakeEngine, Harness, reply_deltas, until


class RawClient:
    """Speaks ASGI to the application, so that it can vanish at any point."""

    def __init__(self, harness: Harness, **fields: Any) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Message] = []
        self.broken = False
        self._body = [json.dumps({"prompt": "Hi", "max_tokens": 100, **fields}).encode()]
        self.task = asyncio.ensure_future(harness.app(self._scope(), self._receive, self._send))

    def _scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    async def _receive(self) -> Message:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.broken:
            raise OSError("gone")
        self.sent.append(message)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("deltas", [0, 1, 2])
async def test_while_queued_or_running(deltas: int, stream: bool) -> None:
    harness = Harness(FakeEngine(script=None))
    client = RawClient(harness, stream=stream, n=2)
    await until(lambda: bool(harness.engine.groups))
    (group,) = harness.engine.groups
    scripts = [reply_deltas(request) for request in group.requests]
    group.feed(*(list(step) for step in list(zip(*scripts, strict=True))[:deltas]))
    await until(group.arrived.empty)
    client.gone.set()
    await asyncio.wait_for(client.task, 1)
    assert group.aborted == [request.request_id for request in group.requests]
    counted = harness.count()
    assert counted.counters["requests_total", "abort"] == 2
    assert counted.counters["http_requests_total", "/v1/completions", "POST", "499"] == 1
    # What got tokens is observed, to the end, exactly once.
    got_tokens = 2 if deltas else 0
    for name in ("time_to_first_token_seconds", "request_latency_seconds", "request_generation_tokens"):
        assert counted.observations.get(name, 0) == got_tokens


async def test_while_one_of_two_answers_has_ended() -> None:
    harness = Harness(FakeEngine(script=None))
    client = RawClient(harness, n=2)
    await until(lambda: bool(harness.engine.groups))
    (group,) = harness.engine.groups
    group.feed(*([delta] for delta in reply_deltas(group.requests[0])))
    await until(group.arrived.empty)
    client.gone.set()
    await asyncio.wait_for(client.task, 1)
    assert group.aborted == [group.requests[1].request_id]
    counted = harness.count().counters
    assert (counted["requests_total", "stop"], counted["requests_total", "abort"]) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_engine_has_accepted(stream: bool) -> None:
    harness = Harness()
    harness.engine.accepts.clear()
    client = RawClient(harness, stream=stream)
    await harness.engine.submitted.wait()
    client.gone.set()
    await asyncio.wait_for(client.task, 1)
    assert harness.engine.cancelled_submits == 1
    assert client.sent == []


async def test_when_writing_finds_the_connection_closed() -> None:
    harness = Harness(FakeEngine(script=None))
    client = RawClient(harness, stream=True)
    await until(lambda: bool(client.sent))
    client.broken = True
    (group,) = harness.engine.groups
    group.feed([reply_deltas(group.requests[0])[0]])
    await asyncio.wait_for(client.task, 1)
    assert group.aborted == [group.requests[0].request_id]
    assert harness.count().counters["requests_total", "abort"] == 1


async def test_when_the_server_stops() -> None:
    harness = Harness(FakeEngine(script=None))
    client = RawClient(harness, stream=True)
    await until(lambda: bool(harness.engine.groups))
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.task
    (group,) = harness.engine.groups
    assert group.aborted == [group.requests[0].request_id]


async def test_no_task_outlives_its_request() -> None:
    harness = Harness()
    before = asyncio.all_tasks()
    for stream in (False, True):
        await harness.complete(stream=stream)
    client = RawClient(harness)
    await client.task
    assert asyncio.all_tasks() - before == set()


async def test_the_work_has_cleaned_up_before_the_client_is_reported_gone() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(True)

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        await unless_disconnected(receive, work())
    assert cleaned


async def test_the_works_own_error_is_raised() -> None:
    async def work() -> None:
        raise ValueError("its own")

    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(ValueError, match="its own"):
        await unless_disconnected(receive, work())


async def test_send_errors_mean_that_the_client_is_gone() -> None:
    async def send(message: Message) -> None:
        raise BrokenPipeError

    with pytest.raises(ClientGoneError):
        await noticing(send)({"type": "http.response.body"})
