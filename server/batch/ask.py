"""A completion without a connection: what answers HTTP requests answers the lines of a batch too."""

import asyncio
from typing import NamedTuple

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.client import EngineClient
from server.app_state import AppState
from server.batch.lines import METHOD, URL
from server.completions import read_completion
from server.request_scope import RequestScope

UNAVAILABLE = 503
QUEUE_FULL = 429
ATTEMPTS = 5
"""A request whose engine dies each time may be what kills it."""
RETRY_S = 0.2


class Answer(NamedTuple):
    """What came of a request: the status and the body that a client would have had."""

    status: int
    request_id: str
    body: bytes


def completion_app(state: AppState) -> ASGIApp:
    """POST /v1/completions alone, without keys and without streams."""

    async def complete(scope: Scope, receive: Receive, send: Send) -> None:
        response = await read_completion(Request(scope, receive), state, may_stream=False)
        await response(scope, receive, send)

    return RequestScope(complete, state.metrics)


async def ask(app: ASGIApp, body: bytes) -> Answer:
    """One request with this body."""
    sent: list[Message] = []
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not request:
            # Nobody hangs up; who waits for that is cancelled.
            await asyncio.get_running_loop().create_future()
        return request.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": METHOD,
        "scheme": "http",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
    }
    await app(scope, receive, send)
    start, *parts = sent
    request_id = next(value for name, value in start["headers"] if name == b"x-request-id")
    return Answer(start["status"], request_id.decode("ascii"), b"".join(part.get("body", b"") for part in parts))


async def ask_until_answered(app: ASGIApp, engine: EngineClient, body: bytes) -> Answer:
    """Ask again while queues are full, and a few times if the engine that had the request dies."""
    lost = 0
    while True:
        if engine.up:
            answer = await ask(app, body)
            lost += answer.status == UNAVAILABLE
            if answer.status not in (UNAVAILABLE, QUEUE_FULL) or lost == ATTEMPTS:
                return answer
        await asyncio.sleep(RETRY_S)
