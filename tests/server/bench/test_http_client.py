"""The light client, before a server that says exactly what a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from server.bench.http_client import Address, AddressError, HttpConnection, Response, get, post

OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@contextlib.asynccontextmanager
async def saying(*pieces: bytes, close: bool = False) -> AsyncIterator[Address]:
    """A server that sends these pieces, a moment apart, to each connection that asks."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if close:
                    break
        writer.close()
        ended.put_nowait(None)

    ended: asyncio.Queue[None] = asyncio.Queue()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
        # Every test makes one connection, and hangs up.
        await asyncio.wait_for(ended.get(), 5)


async def ask(address: Address) -> Response:
    return await asyncio.wait_for(get(address, "/v1/models", {}), 5)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", Address("localhost", 8000)),
        ("http://localhost:8000/v1/", Address("localhost", 8000)),
        ("https://host/base/v1", Address("host", 443, tls=True, base="/base")),
        ("host:81", Address("host", 81)),
        ("http://[::1]:9", Address("::1", 9)),
    ],
)
def test_urls(url: str, address: Address) -> None:
    assert Address.of(url) == address


@pytest.mark.parametrize("url", ["", "ftp://host", "http://:80", "http://host:port", "http://host:99999"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(AddressError, match="no URL"):
        Address.of(url)


def test_a_head_carries_no_line_of_its_own() -> None:
    assert Address("::1", 9, base="/b").head("GET", "/x", {"a": "b"}) == b"GET /b/x HTTP/1.1\r\nhost: [::1]:9\r\na: b"
    for value in ("b\r\nc: d", "ü"):
        with pytest.raises(AddressError, match="does not carry"):
            Address("host", 9).head("GET", "/x", {"a": value})


def test_a_body_has_its_length() -> None:
    assert post(b"POST / HTTP/1.1", b"{}").endswith(b"\r\ncontent-length: 2\r\n\r\n{}")


async def test_texts_that_come_together_are_one_delivery() -> None:
    text = chunk(b'data: {"choices":[{"text":"a"}]}\n\n')
    usage = chunk(b'data: {"choices":[],"usage":{}}\n\n')
    async with saying(OK + text + text, text, usage, END) as address:
        response = await ask(address)
    assert response.status == 200
    assert response.body.count(b"data: ") == 4
    assert len(response.deliveries) == 2
    assert response.deliveries[1] - response.deliveries[0] >= 0.005


async def test_a_text_cut_anywhere_is_one_delivery() -> None:
    event = b'{"text":"x"}'
    for cut in range(1, len(event)):
        async with saying(OK, chunk(event[:cut]), chunk(event[cut:]), END) as address:
            assert len((await ask(address)).deliveries) == 1
    async with saying(OK, *(chunk(event[place : place + 1]) for place in range(len(event))), END) as address:
        assert len((await ask(address)).deliveries) == 1


async def test_what_is_written_in_a_text_is_no_delivery() -> None:
    async with saying(OK, chunk(b'{"x":"\\"text\\":"}'), END) as address:
        assert (await ask(address)).deliveries == []


async def test_answers_on_one_connection_are_kept_apart() -> None:
    async with saying(OK + chunk(b'{"text":"a"}') + END) as address:
        connection = await HttpConnection.open(address)
        request = address.head("GET", "/", {}) + b"\r\n\r\n"
        answers = [await connection.request(request) for _ in range(2)]
        assert [(one.body, len(one.deliveries)) for one in answers] == [(b'{"text":"a"}', 1)] * 2
        assert connection.usable
        connection.close()
        with pytest.raises(ConnectionError):
            await connection.request(request)


async def test_an_answer_that_is_cut_off_or_is_no_http() -> None:
    async with saying(OK + chunk(b"half"), close=True) as address:
        with pytest.raises(ConnectionError, match="ended before the answer did"):
            await ask(address)
    async with saying(b"SSH-2.0\r\n\r\n") as address:
        with pytest.raises(ConnectionError, match="not HTTP"):
            await ask(address)


async def test_a_request_that_is_given_up_closes_its_connection() -> None:
    async with saying(OK) as address:
        connection = await HttpConnection.open(address)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.request(address.head("GET", "/", {}) + b"\r\n\r\n"), 0.05)
        assert not connection.usable
