"""A light HTTP/1.1 client for load: a client that costs more than the server measures itself.

The parser is httptools', all chunks that come together make one wake-up, and there is no pool to search.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, cast
from urllib.parse import urlsplit

import httptools

MARK = b'"text":'
"""In every chunk with text, in none with usage or the end of the stream, and in no text, where quotes are escaped."""


class AddressError(ValueError):
    """A URL that cannot be asked. The message says why."""


@dataclass(frozen=True)
class Address:
    """Where a server is: `http://host:port/base`, without a /v1 at its end."""

    host: str
    port: int
    tls: bool = False
    base: str = ""

    @classmethod
    def of(cls, url: str) -> Self:
        """The address of a URL, with or without /v1. Raises AddressError."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise AddressError(f"{url} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AddressError(f"{url} is no URL of an HTTP server, like http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """A request's head, but for the length of its body and the empty line. Raises AddressError."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.base}{path} HTTP/1.1", f"host: {host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if not all(line.isascii() and line.isprintable() for line in lines):
            raise AddressError("a URL or header has characters that HTTP does not carry")
        return "\r\n".join(lines).encode("ascii")


@dataclass
class Response:
    """A whole response."""

    status: int
    body: bytes
    """All of its chunks, joined."""
    deliveries: list[float] = field(default_factory=list)
    """When text came (monotonic seconds); what came in one read of the connection is one delivery."""


class HttpConnection(asyncio.Protocol):
    """One connection, which takes one request after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._tail = b""
        self._deliveries: list[float] = []
        self._delivered = False
        """Whether text was seen in the read that is being parsed."""
        self._answer: asyncio.Future[Response] | None = None
        self._closed = False

    @classmethod
    async def open(cls, address: Address) -> "HttpConnection":
        """Connect. OSError if nobody listens."""
        context = ssl.create_default_context() if address.tls else None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address.host, address.port, ssl=context)
        return connection

    @property
    def deliveries(self) -> Sequence[float]:
        """When text of the answer under way came, until now."""
        return self._deliveries

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
        self._delivered = False
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
        # A mark may be split between two pieces; what is kept of the last one is too short to hold a whole one.
        window = self._tail + body
        if not self._delivered and MARK in window:
            self._delivered = True
            self._deliveries.append(time.monotonic())
        self._tail = window[1 - len(MARK) :]

    def on_message_complete(self) -> None:
        """An answer is whole."""
        response = Response(self._parser.get_status_code(), b"".join(self._parts), self._deliveries)
        self._parts, self._deliveries, self._tail = [], [], b""
        if not self._parser.should_keep_alive():
            self._closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(reason))


def post(head: bytes, body: bytes) -> bytes:
    """A POST request of a JSON body, as it goes over the wire; `head` is that of `Address.head`."""
    return b"%b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body)


async def get(address: Address, path: str, headers: Mapping[str, str]) -> Response:
    """One GET request on a connection of its own. OSError or AddressError if it cannot be made."""
    connection = await HttpConnection.open(address)
    try:
        return await connection.request(address.head("GET", path, headers) + b"\r\n\r\n")
    finally:
        connection.close()
