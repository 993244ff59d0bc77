"""A light HTTP/1.1 client for load: a client that costs more than the server measures itself.

The parser is httptools', all chunks of an answer make one wake-up, and there is no pool to search.
"""

import asyncio
from dataclasses import dataclass
from typing import cast

import httptools


@dataclass(frozen=True)
class Response:
    """A whole response."""

    status: int
    body: bytes
    """All of its chunks, joined."""


def post(path: str, body: bytes) -> bytes:
    """A POST request of a JSON body, as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode("ascii") + b"\r\n\r\n" + body


class HttpConnection(asyncio.Protocol):
    """One connection, which takes one request after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._answer: asyncio.Future[Response] | None = None
        self._closed = False

    @classmethod
    async def open(cls, host: str, port: int) -> "HttpConnection":
        """Connect. OSError if nobody listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    @property
    def usable(self) -> bool:
        """Whether it can take a request now."""
        return not self._closed and self._answer is None

    async def request(self, data: bytes) -> Response:
        """Send a request and wait for its whole answer. OSError if the connection ends first; cancelled, it closes."""
        if not self.usable or self._transport is None:
            raise ConnectionError("the connection is closed or has a request under way")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        """Hang up."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        # uvloop's are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Some more of an answer."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection."""
        self._closed = True
        self._fail(f"the connection ended before the answer did: {exc or 'closed by the server'}")

    # --- httptools ---

    def on_body(self, body: bytes) -> None:
        """A piece of an answer's body."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """An answer is whole."""
        response = Response(self._parser.get_status_code(), b"".join(self._parts))
        self._parts = []
        if not self._parser.should_keep_alive():
            self._closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(reason))
