"""A client's id for its request comes back on every answer and names the request in the log; it is never our key."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from engine.client import EngineRejectedError, EngineUnavailableError
from engine.types import Delta, GenerationRequest
from tests.server.fakes import FakeEngine, Harness, events

MINE = {"x-request-id": "mine-1"}


def healthy() -> Harness:
    return Harness(max_body_bytes=4096)


def full() -> Harness:
    harness = Harness()
    harness.engine.refuse = EngineRejectedError("queue_full", "full")
    return harness


def down() -> Harness:
    harness = Harness()
    harness.engine.refuse = EngineUnavailableError("nobody")
    return harness


def broken() -> Harness:
    def fail(request: GenerationRequest) -> list[Delta]:
        raise RuntimeError("no matter what")

    return Harness(FakeEngine(fail))


@pytest.mark.parametrize(
    ("make", "method", "path", "body", "status"),
    [
        (healthy, "POST", "/v1/completions", b'{"prompt": "Hi"}', 200),
        (healthy, "POST", "/v1/completions", b'{"prompt": "Hi", "stream": true}', 200),
        (healthy, "POST", "/v1/completions", b"{", 400),
        (healthy, "POST", "/v1/completions", b'{"prompt": "Hi", "n": 0}', 400),
        (healthy, "POST", "/v1/completions", b"x" * 5000, 413),
        (healthy, "GET", "/v1/completions", b"", 405),
        (healthy, "GET", "/nothing", b"", 404),
        (healthy, "GET", "/v1/models", b"", 200),
        (healthy, "HEAD", "/health", b"", 200),
        (full, "POST", "/v1/completions", b'{"prompt": "Hi"}', 429),
        (down, "POST", "/v1/completions", b'{"prompt": "Hi"}', 503),
        (broken, "POST", "/v1/completions", b'{"prompt": "Hi"}', 500),
    ],
)
async def test_every_answer_has_the_id_of_the_request(
    make: Callable[[], Harness],
    method: str,
    path: str,
    body: bytes,
    status: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="server"):
        async with make().client() as client:
            named = await client.request(method, path, content=body, headers=MINE)
            unnamed = await client.request(method, path, content=body)
    assert (named.status_code, unnamed.status_code) == (status, status)
    lines = [vars(record) for record in caplog.records if record.message == "request"]
    assert named.headers.get_list("x-request-id") == [lines[0]["client_id"]] == ["mine-1"]
    assert unnamed.headers.get_list("x-request-id") == [lines[1]["id"]]


@pytest.mark.parametrize(
    "value", [b"", b"two words", b"x" * 129, b"\xc3\xa9", b"tab\there", b"bell\x07"], ids=lambda value: repr(value[:9])
)
async def test_an_id_that_is_too_long_or_of_other_characters_is_replaced(value: bytes) -> None:
    async with Harness().client() as client:
        response = await client.get("/version", headers={b"x-request-id": value})
    assert len(response.headers["x-request-id"]) == 32
    assert response.headers["x-request-id"].encode() != value


async def test_the_longest_id_is_taken() -> None:
    async with Harness().client() as client:
        response = await client.get("/version", headers={"x-request-id": "~" * 128})
    assert response.headers["x-request-id"] == "~" * 128


@pytest.mark.parametrize("fields", [{}, {"temperature": 9}, {"model": "other"}, {"stream": True}, {"echo": "yes"}])
async def test_the_field_names_the_request_as_the_header_does_whatever_else_is_wrong(fields: dict[str, Any]) -> None:
    response = await Harness().complete(request_id="mine-2", **fields)
    assert response.headers["x-request-id"] == "mine-2"


async def test_requests_with_one_id_are_two_requests() -> None:
    harness = Harness()
    async with harness.client() as client:
        first, second = [
            await client.post("/v1/completions", json={"prompt": "Hi", "request_id": "same"}) for _ in range(2)
        ]
    assert first.json()["id"] != second.json()["id"]
    assert "same" not in first.json()["id"]
    assert len({request.request_id for request in harness.engine.requests}) == 2


async def test_a_stream_has_our_id_in_its_chunks_and_the_clients_in_its_header() -> None:
    response = await Harness().complete(request_id="mine-3", stream=True)
    *chunks, _ = events(response.text)
    assert response.headers["x-request-id"] == "mine-3"
    assert all(chunk["id"].startswith("cmpl-") and "mine" not in chunk["id"] for chunk in chunks)
