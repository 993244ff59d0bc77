"""An engine's connection to the supervisor, and what makes a process its child. Torch-free.

Reading and writing have a thread each, so that neither a step in flight nor a supervisor that is slow to read holds up
the other side: end of file (the supervisor died) ends this process at once, even in the middle of a step.
"""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

from engine.messages import (
    ChildHello,
    FromSupervisor,
    ProtocolError,
    ToSupervisor,
    encode_frame,
    from_supervisor_reader,
)

log = logging.getLogger(__name__)

EXIT_ORPHANED = 3
"""Exit code of a child whose supervisor is gone."""

_MAX_UNSENT = 100_000
"""Messages. A supervisor that left so many unread will not come back."""
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


def become_child() -> None:
    """Tie this process to its supervisor. To be called by the main thread, first thing.

    Ctrl-C and SIGTERM are the supervisor's to answer, also where a service manager signals the whole group: a child
    stops on Shutdown, on end of file, or is killed. Should its threads be stuck when the supervisor dies, the kernel
    kills it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def exit_orphaned() -> None:
    """End this process now: the supervisor is gone, and nobody is left to clean up for."""
    os._exit(EXIT_ORPHANED)


def leave(code: int) -> NoReturn:
    """End this process once what it logged is out, without taking interpreter and libraries apart.

    Threads that still run then may abort it ("terminate called without an active exception"), and nothing is left that
    the kernel would not clean up.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ControlChannel:
    """Messages to and from the supervisor. Every method may be called from any thread."""

    def __init__(
        self,
        stream: socket.socket,
        on_message: Callable[[], None] | None = None,
        on_end: Callable[[], None] = exit_orphaned,
    ) -> None:
        """Take over a connected, blocking stream.

        `on_message` is called, in the reading thread, after a message was put where `poll` finds it; `on_end`, in
        either thread, when the connection ended or broke without `close`.
        """
        self._stream = stream
        self._on_message = on_message
        self._on_end = on_end
        self._closing = False
        self._received: queue.SimpleQueue[FromSupervisor] = queue.SimpleQueue()
        self._unsent: queue.SimpleQueue[ToSupervisor | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="control-read", daemon=True)
        self._writer = threading.Thread(target=self._write, name="control-write", daemon=True)
        self._reader.start()
        self._writer.start()

    @classmethod
    def connect(
        cls,
        path: Path,
        role: Literal["engine", "api"],
        index: int,
        on_message: Callable[[], None] | None = None,
        on_end: Callable[[], None] = exit_orphaned,
    ) -> "ControlChannel":
        """Connect to the supervisor's socket and say who is speaking. OSError if nobody listens there."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(str(path))
        except OSError:
            stream.close()
            raise
        channel = cls(stream, on_message, on_end)
        channel.send(ChildHello(role=role, index=index, pid=os.getpid()))
        return channel

    def send(self, message: ToSupervisor) -> None:
        """Queue a message; never waits."""
        if self._unsent.qsize() > _MAX_UNSENT:
            self._end("the supervisor does not read")
            return
        self._unsent.put(message)

    def poll(self) -> list[FromSupervisor]:
        """What has arrived since the last call, in order; never waits."""
        messages: list[FromSupervisor] = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._received.get_nowait())
        return messages

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is queued, waiting up to `timeout_s` seconds for it, and hang up. `on_end` is not called."""
        self._closing = True
        self._unsent.put(None)
        self._writer.join(timeout_s)
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._reader.join(timeout_s)
        self._stream.close()

    def _read(self) -> None:
        frames = from_supervisor_reader()
        try:
            while data := self._stream.recv(_READ_BYTES):
                for message in frames.feed(data):
                    self._received.put(message)
                    if self._on_message is not None:
                        self._on_message()
        except (OSError, ProtocolError) as error:
            self._end(str(error))
        else:
            self._end("the supervisor is gone")

    def _write(self) -> None:
        try:
            while (message := self._unsent.get()) is not None:
                self._stream.sendall(encode_frame(message))
        except OSError as error:
            self._end(str(error))

    def _end(self, reason: str) -> None:
        if not self._closing:
            log.error("control connection lost: %s", reason)
            self._on_end()
