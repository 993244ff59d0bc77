"""How connections are taken up, by the loop that API processes run."""

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest
import uvloop
from starlette.responses import PlainTextResponse

from engine.metrics import MetricsRecorder
from engine.socket_client import SocketEngineClient
from server.api_process import serve_app
from server.control import SupervisorLink
from server.sockets import bind_port

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


@asynccontextmanager
async def served(listener: socket.socket) -> AsyncIterator[None]:
    """Serve a plain answer until the supervisor wants it to end."""
    ours, theirs = socket.socketpair()
    link = SupervisorLink(*await asyncio.open_connection(sock=theirs), on_end=lambda: None)
    engine = SocketEngineClient([], MetricsRecorder(lambda _: None))
    serving = asyncio.create_task(serve_app(PlainTextResponse("here"), listener, link, engine))
    yield
    link.shutdown.set_result(0)
    await serving
    await link.close()
    ours.close()


async def ask(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(REQUEST)
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()


def test_a_turn_of_the_event_loop_takes_up_many_connections() -> None:
    """A probe is not answered a turn later for each client that connected before it: turns can be long."""

    async def turns_until_answered(listener: socket.socket) -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        address = listener.getsockname()
        counting = asyncio.create_task(count())
        async with served(listener):
            await ask(address)
            taken = turns
        counting.cancel()
        return taken

    with bind_port("127.0.0.1", 0) as listener, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        assert uvloop.run(turns_until_answered(listener)) < 50


class Exhausted(socket.socket):
    """A listening socket of a process that has no descriptor left, twice."""

    def __init__(self, bound: socket.socket) -> None:
        super().__init__(fileno=bound.detach())
        self.failures: list[float] = []

    def accept(self) -> tuple[socket.socket, object]:
        """Fail, or accept."""
        if len(self.failures) < 2:
            self.failures.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_where_descriptors_run_out_connections_are_accepted_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.http_server.PAUSE_S", 0.05)

    async def answered(listener: Exhausted) -> None:
        async with served(listener):
            await asyncio.wait_for(ask(address), 20)

    with bind_port("127.0.0.1", 0) as bound:
        address = bound.getsockname()
        listener = Exhausted(bound)
    uvloop.run(answered(listener))
    first, second = listener.failures
    assert second - first > 0.04
    message = "no connection can be accepted, next try in 0.05 s: [Errno 24] Too many open files"
    assert [record.getMessage() for record in caplog.records] == [message] * 2


def test_a_server_that_ends_while_it_waits_for_descriptors_accepts_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.http_server.PAUSE_S", 0.2)

    async def ended(listener: Exhausted) -> None:
        async with served(listener):
            with socket.create_connection(address):
                while not listener.failures:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(0.4)

    with bind_port("127.0.0.1", 0) as bound:
        address = bound.getsockname()
        listener = Exhausted(bound)
    uvloop.run(ended(listener))
    assert (listener.fileno(), len(listener.failures)) == (-1, 1)
    assert len(caplog.records) == 1, "the loop came back to a socket that is closed"
