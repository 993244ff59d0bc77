"""The supervisor's end of the control connections: one AF_UNIX socket, one connection a child."""

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Protocol

from engine.messages import (
    ChildHello,
    FromSupervisor,
    ProtocolError,
    ToSupervisor,
    encode_frame,
    to_supervisor_reader,
)

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
MAX_UNSENT_BYTES = 1 << 26
"""A child that leaves this much unread is cut off."""


class ControlLink:
    """The connection of a child that has said who it is."""

    def __init__(self, hello: ChildHello, writer: asyncio.StreamWriter) -> None:
        self.hello = hello
        self.closed = asyncio.Event()
        self._writer = writer

    def send(self, message: FromSupervisor) -> None:
        """Queue a message; dropped if the connection is gone."""
        if self._writer.is_closing():
            return
        self._writer.write(encode_frame(message))
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.error("%s %d does not read; closing its connection", self.hello.role, self.hello.index)
            self._writer.transport.abort()

    def close(self) -> None:
        """Hang up. The child takes that for the supervisor's death."""
        self._writer.close()


class ControlHandler(Protocol):
    """Who is told what children say. A ProtocolError raised here closes that connection and nothing else."""

    def connected(self, link: ControlLink) -> None:
        """A child said who it is. Raises ProtocolError if it is none."""

    def received(self, link: ControlLink, message: ToSupervisor) -> None:
        """A child sent a message after its hello."""

    def disconnected(self, link: ControlLink) -> None:
        """A connection that `connected` took is gone."""


class ControlServer:
    """Listens while it is entered: `async with ControlServer(path, handler):`."""

    def __init__(self, path: Path, handler: ControlHandler) -> None:
        self._path = path
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "ControlServer":
        self._server = await asyncio.start_unix_server(self._accept, str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = to_supervisor_reader()
        link: ControlLink | None = None
        try:
            while data := await reader.read(READ_BYTES):
                for message in frames.feed(data):
                    if link is not None:
                        self._handler.received(link, message)
                    elif isinstance(message, ChildHello):
                        greeted = ControlLink(message, writer)
                        self._handler.connected(greeted)
                        link = greeted
                    else:
                        raise ProtocolError("the first message is not ChildHello")
        except ProtocolError as error:
            who = "a stranger" if link is None else f"{link.hello.role} {link.hello.index}"
            log.error("closing the control connection of %s: %s", who, error)
        except OSError as error:
            log.debug("a control connection broke: %s", error)
        finally:
            with contextlib.suppress(OSError):
                writer.close()
            if link is not None:
                link.closed.set()
                self._handler.disconnected(link)
