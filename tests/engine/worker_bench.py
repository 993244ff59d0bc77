"""An EngineWorker with a real core, listener and control channel, whose loop a test turns by hand."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from engine.control import ControlChannel
from engine.core import EngineCore
from engine.listener import MessageListener
from engine.messages import (
    AnyMessage,
    Deltas,
    FromEngine,
    MetricsIncrement,
    Shutdown,
    ToSupervisor,
    encode_frame,
    from_engine_reader,
    to_supervisor_reader,
)
from engine.types import Delta
from engine.worker import EngineWorker

M = TypeVar("M", bound=FromEngine)


class Peer:
    """An API process's end of a connection: sends what it is told to, and keeps what came."""

    def __init__(self, path: Path) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(str(path))
        self.stream.setblocking(False)
        self.received: list[FromEngine] = []
        self.ended = False
        """Whether the engine has closed the connection."""
        self._frames = from_engine_reader()

    def send(self, *messages: AnyMessage | bytes) -> None:
        """Send messages, or bytes as they are; a connection that the engine has closed takes nothing."""
        try:
            self.stream.sendall(b"".join(m if isinstance(m, bytes) else encode_frame(m) for m in messages))
        except (BrokenPipeError, ConnectionResetError):
            self.ended = True

    def read(self) -> None:
        """Take all that has come."""
        try:
            while data := self.stream.recv(1 << 18):
                self.received += self._frames.feed(data)
            self.ended = True
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.ended = True

    def of_kind(self, kind: type[M]) -> list[M]:
        """The messages of a kind that came."""
        self.read()
        return [message for message in self.received if isinstance(message, kind)]

    def deltas(self, request_id: int) -> list[Delta]:
        """What came for one request, in order."""
        return [d for message in self.of_kind(Deltas) for d in message.unpacked() if d.request_id == request_id]

    def tokens(self, request_id: int) -> list[int]:
        """All tokens that came for one request."""
        return [token for delta in self.deltas(request_id) for token in delta.token_ids]

    def finished(self, *request_ids: int) -> bool:
        """Whether all of these requests have ended."""
        return all(any(delta.finish_reason for delta in self.deltas(request_id)) for request_id in request_ids)

    def close(self) -> None:
        """Hang up."""
        self.stream.close()


class WorkerBench:
    """The worker, and both ends of what it is connected to."""

    def __init__(self, core: EngineCore, directory: Path, step_timeout_s: float = 60.0) -> None:
        self.core = core
        self.path = directory / "engine.sock"
        self.listener = MessageListener()
        self.listener.listen(self.path)
        self._supervisor, stream = socket.socketpair()
        self._supervisor.setblocking(False)
        self._frames = to_supervisor_reader()
        self._told: list[ToSupervisor] = []
        self._peers: list[Peer] = []
        self.control = ControlChannel(stream, on_message=self.listener.wake, on_end=lambda: None)
        self.worker = EngineWorker(core, self.listener, self.control, index=0, step_timeout_s=step_timeout_s)

    def connect(self) -> Peer:
        """A new peer; the worker sees it in its next turn."""
        self._peers.append(Peer(self.path))
        return self._peers[-1]

    def turn_until(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Turn the loop until `condition` holds; AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen in {timeout:g} s"
            self.worker.turn(0.0)

    def counters(self) -> Counter[str]:
        """What the worker has counted and sent so far, by name."""
        counted: Counter[str] = Counter()
        for message in self.told():
            if isinstance(message, MetricsIncrement):
                counted.update({name: int(amount) for name, _, amount in message.counters})
        return counted

    def shut_down(self) -> None:
        """Tell the worker to stop at once."""
        self._supervisor.sendall(encode_frame(Shutdown(deadline_s=0.0)))

    def told(self) -> list[ToSupervisor]:
        """What the supervisor has been told so far."""
        try:
            while data := self._supervisor.recv(1 << 18):
                self._told += self._frames.feed(data)
        except BlockingIOError:
            pass
        return self._told

    def close(self) -> None:
        """Close everything."""
        for peer in self._peers:
            peer.close()
        self.listener.close()
        self.control.close()
        self._supervisor.close()


@contextmanager
def worker_bench(core: EngineCore, directory: Path, step_timeout_s: float = 60.0) -> Iterator[WorkerBench]:
    """A worker that serves `core` on a socket in `directory`."""
    bench = WorkerBench(core, directory, step_timeout_s)
    try:
        yield bench
    finally:
        bench.close()
