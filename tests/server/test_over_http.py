"""The application under the real HTTP server: what only bytes on a connection can show."""

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from engine.types import Delta
from server.http_protocol import ClientProtocol
from tests.server.fakes import FakeEngine, Harness, reply_deltas, until

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A listening server over a harness."""

    def __init__(self, harness: Harness, port: int) -> None:
        self.harness = harness
        self.port = port

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, body: bytes, headers: str = "") -> Connection:
        """Send a completion request; the answer is not read."""
        reader, writer = await self.connect()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def listening(harness: Harness, keep_alive: int = 5) -> AsyncIterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            harness.app, http=ClientProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
            timeout_keep_alive=keep_alive, timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
        task = asyncio.ensure_future(server.serve([listener]))
        await until(lambda: server.started)
        try:
            yield Server(harness, listener.getsockname()[1])
        finally:
            server.should_exit = True
            await task


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Hi", "max_tokens": 100, **fields}).encode()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return int(head[0].split()[1]), dict(line.lower().split(": ", 1) for line in head[1:] if line)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    status, headers = await read_head(reader)
    return status, json.loads(await reader.readexactly(int(headers["content-length"])))


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("abrupt", [False, True])
async def test_a_client_that_closes_its_connection(stream: bool, abrupt: bool) -> None:
    async with listening(Harness(FakeEngine(script=None))) as server:
        _, writer = await server.post(completion(stream=stream))
        await until(lambda: bool(server.harness.engine.groups))
        if abrupt:
            writer.transport.abort()
        else:
            await close(writer)
        (group,) = server.harness.engine.groups
        await until(lambda: bool(group.aborted))
        assert group.aborted == [group.requests[0].request_id]


async def test_a_client_that_closes_within_its_body() -> None:
    async with listening(Harness()) as server:
        _, writer = await server.connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.02)
        await close(writer)
        key = ("http_requests_total", "/v1/completions", "POST", "499")
        await until(lambda: server.harness.count().counters.get(key) == 1)
        assert server.harness.engine.groups == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_huge_body_is_refused_without_being_kept(chunked: bool) -> None:
    size, part = 100 << 20, b"x" * (1 << 20)
    async with listening(Harness(max_body_bytes=1 << 20)) as server:
        reader, writer = await server.connect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        for _ in range(size // len(part)):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
        status, body = await asyncio.wait_for(read_answer(reader), 10)
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 32 << 10, f"{grown} KiB were kept"
        # The connection is still in order.
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        await close(writer)


async def test_a_body_that_comes_byte_by_byte() -> None:
    async with listening(Harness()) as server:
        reader, writer = await server.connect()
        body = completion()
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for byte in body:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await read_answer(reader))[0] == 200
        await close(writer)


async def test_head_sends_no_body() -> None:
    async with listening(Harness()) as server:
        reader, writer = await server.connect()
        writer.write(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers = await read_head(reader)
        assert (status, headers["content-length"]) == (200, str(len(b"# HELP x\n")))
        assert (await read_answer(reader))[1]["version"] == "1.2.3"
        await close(writer)


async def test_chunks_leave_as_they_come() -> None:
    async with listening(Harness(FakeEngine(script=None))) as server:
        reader, writer = await server.post(completion(stream=True))
        status, headers = await read_head(reader)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        (group,) = server.harness.engine.groups
        for delta in reply_deltas(group.requests[0]):
            group.feed([delta])
            assert b"data: " in await asyncio.wait_for(reader.readuntil(b"\n\n"), 2)
        await asyncio.wait_for(reader.readuntil(b"data: [DONE]\n\n"), 2)
        await close(writer)


async def test_a_reader_that_does_not_read_holds_up_nobody_and_is_still_noticed_when_it_leaves() -> None:
    harness = Harness(FakeEngine(script=None))
    async with listening(harness) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", server.port))
        body = completion(stream=True)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        await asyncio.get_running_loop().sock_sendall(slow, head + body)
        await until(lambda: bool(harness.engine.groups))
        stuck = harness.engine.groups[0]
        request_id = stuck.requests[0].request_id
        for _ in range(20):
            stuck.feed(*([Delta(request_id=request_id, token_ids=(70, 71, 72, 73) * 2000)] for _ in range(20)))
            await asyncio.sleep(0)
        harness.engine.script = reply_deltas
        reader, writer = await server.post(completion())
        assert (await asyncio.wait_for(read_answer(reader), 2))[0] == 200
        await close(writer)
        assert not stuck.arrived.empty(), "the slow reader was not slow enough to prove anything"
        slow.close()
        await until(lambda: stuck.aborted == [request_id])


async def test_a_reader_that_is_too_far_behind_is_cut_off() -> None:
    harness = Harness(FakeEngine(script=None), max_unread=7)
    async with listening(harness) as server:
        reader, writer = await server.post(completion(stream=True))
        await read_head(reader)
        (group,) = harness.engine.groups
        assert group.most_unread == 7
        group.exceeded()
        assert not (await reader.read()).endswith(b"0\r\n\r\n")
        await until(lambda: group.aborted == [group.requests[0].request_id])
        await close(writer)
        key = ("http_requests_total", "/v1/completions", "POST", "499")
        await until(lambda: harness.count().counters.get(key) == 1)


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with listening(Harness(), keep_alive=0) as server:
        reader, writer = await server.connect()
        assert await asyncio.wait_for(reader.read(), 2) == b""
        await close(writer)


async def test_requests_on_one_connection_follow_each_other() -> None:
    async with listening(Harness()) as server:
        reader, writer = await server.connect()
        for body, expected in ((b"{", 400), (completion(), 200), (completion(n=0), 400), (completion(n=2), 200)):
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            assert (await read_answer(reader))[0] == expected
        await close(writer)
