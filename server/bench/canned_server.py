"""An HTTP server that computes nothing, to measure a load tester with: `python -m server.bench.canned_server [PACE]`.

Prints its port. Every POST is answered with as many tokens as it asks for, in prepared bytes: whole, or as a stream of
blocks that goes on as fast as it is read. Streams take turns, a block each, as those of a real server do, so that the
client wakes up as often. With PACE, seconds, each stream has its first block that long after its request, and each
block that long after the one before: what a load tester should then say is known.
"""

import asyncio
import sys
from collections import deque
from typing import cast

import uvloop

from engine.control import become_child

BLOCK = 4
"""Tokens in a chunk."""
TEXT = " and then"

CHOICE = '"id":"cmpl-0","object":"text_completion","created":0,"model":"canned","choices":[%s]'
USAGE = '"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """A piece of a body, as HTTP/1.1 sends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str, finish_reason: str = "null") -> bytes:
    """A chunk of a stream."""
    choice = f'{{"index":0,"text":"{text}","finish_reason":{finish_reason},"logprobs":null}}'
    return chunk(b"data: {%b}\n\n" % (CHOICE % choice).encode())


MIDDLE = event(TEXT * BLOCK)
LAST = event(TEXT * BLOCK, '"length"')


def stream_end(tokens: int) -> bytes:
    """The usage, and the end of the stream."""
    usage = f"data: {{{CHOICE % ''},{USAGE % (tokens, tokens + 1)}}}\n\n".encode()
    return chunk(usage) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def whole(tokens: int) -> bytes:
    """An answer that is not streamed."""
    choice = f'{{"index":0,"text":"{TEXT * tokens}","finish_reason":"length","logprobs":null}}'
    body = f"{{{CHOICE % choice},{USAGE % (tokens, tokens + 1)}}}".encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Streams:
    """Open streams, which take turns."""

    def __init__(self, pace: float = 0.0) -> None:
        self._pace = pace
        self._open: deque[tuple[asyncio.Transport, int, int]] = deque()
        self._stepping = False

    def begin(self, transport: asyncio.Transport, tokens: int) -> None:
        """Stream so many tokens."""
        transport.write(HEAD)
        if self._pace:
            loop = asyncio.get_running_loop()
            loop.call_later(self._pace, self._deliver, transport, tokens, tokens, loop.time() + self._pace)
            return
        self._open.append((transport, tokens, tokens))
        if not self._stepping:
            self._stepping = True
            asyncio.get_running_loop().call_soon(self._step)

    def _deliver(self, transport: asyncio.Transport, left: int, tokens: int, due: float) -> None:
        """A block of a stream with a pace."""
        if transport.is_closing():
            return
        left -= BLOCK
        transport.write(MIDDLE if left > 0 else LAST + stream_end(tokens))
        if left > 0:
            due += self._pace
            asyncio.get_running_loop().call_at(due, self._deliver, transport, left, tokens, due)

    def _step(self) -> None:
        """A block for each that reads what it gets."""
        for _ in range(len(self._open)):
            transport, left, tokens = self._open.popleft()
            if transport.is_closing():
                continue
            if transport.get_write_buffer_size() == 0:
                left -= BLOCK
                transport.write(MIDDLE if left > 0 else LAST + stream_end(tokens))
            if left > 0:
                self._open.append((transport, left, tokens))
        self._stepping = bool(self._open)
        if self._stepping:
            asyncio.get_running_loop().call_soon(self._step)


class Connection(asyncio.Protocol):
    """One connection; reads just as much of HTTP as load testers write."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Some more of a request."""
        self._data += data
        end = self._data.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = number_after(self._data[:end].lower(), b"content-length: ")
        if len(self._data) < end + length:
            return
        body, self._data = self._data[end : end + length], self._data[end + length :]
        tokens = number_after(body, b'"max_tokens":')
        if b'"stream":true' in body:
            self._streams.begin(self._transport, tokens)
        else:
            self._transport.write(whole(tokens))


def number_after(data: bytes, name: bytes) -> int:
    """The digits behind a name. Raises ValueError where there are none."""
    start = data.index(name) + len(name)
    end = start
    while data[end : end + 1].isdigit():
        end += 1
    return int(data[start:end])


async def serve(pace: float = 0.0) -> None:
    """Serve until the process ends."""
    streams = Streams(pace)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(streams), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    """Run the process."""
    become_child()
    uvloop.run(serve(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0))


if __name__ == "__main__":
    main()
