"""An API process's connection to the supervisor: the state of the service in, metrics out."""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from engine.control import exit_orphaned
from engine.messages import (
    ChildHello,
    FromSupervisor,
    MetricsText,
    ProtocolError,
    RenderMetrics,
    ServiceState,
    Shutdown,
    ToSupervisor,
    encode_frame,
    from_supervisor_reader,
)

log = logging.getLogger(__name__)

READ_BYTES = 1 << 18
RENDER_TIMEOUT_S = 5.0


class SupervisorLink:
    """The control connection. Its end is the end of this process."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_end: Callable[[], None] = exit_orphaned,
    ) -> None:
        """Take over a connected stream. `on_end` is called when it ends or breaks without `close`."""
        self.state = ServiceState(healthy=True, engines_up=0, draining=False, detail="starting")
        """What /health and /ready answer from."""
        self.on_state: Callable[[ServiceState], None] = lambda _: None
        """Called with every new state."""
        self.shutdown: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """Done when the supervisor wants this process to finish: the seconds that open requests still have."""
        self._writer = writer
        self._on_end = on_end
        self._render_ids = itertools.count()
        self._renders: dict[int, asyncio.Future[tuple[str, bytes]]] = {}
        self._task = asyncio.create_task(self._read(reader))

    @classmethod
    async def connect(cls, path: Path, index: int, on_end: Callable[[], None] = exit_orphaned) -> "SupervisorLink":
        """Connect as API process number `index`. OSError if nobody listens."""
        link = cls(*await asyncio.open_unix_connection(str(path)), on_end)
        link.send(ChildHello(role="api", index=index, pid=os.getpid()))
        return link

    def send(self, message: ToSupervisor) -> None:
        """Queue a message."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def render_metrics(self, openmetrics: bool) -> tuple[str, bytes]:
        """Content type and body of a scrape, from the supervisor's registry. TimeoutError if it does not answer."""
        render_id = next(self._render_ids)
        answer = self._renders[render_id] = asyncio.get_running_loop().create_future()
        try:
            self.send(RenderMetrics(render_id=render_id, openmetrics=openmetrics))
            return await asyncio.wait_for(answer, RENDER_TIMEOUT_S)
        finally:
            del self._renders[render_id]

    async def close(self) -> None:
        """Send what is queued and hang up. `on_end` is not called."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = from_supervisor_reader()
        reason: object = "the supervisor is gone"
        try:
            while data := await reader.read(READ_BYTES):
                for message in frames.feed(data):
                    self._handle(message)
        except (OSError, ProtocolError) as error:
            reason = error
        log.error("control connection lost: %s", reason)
        self._on_end()

    def _handle(self, message: FromSupervisor) -> None:
        match message:
            case ServiceState():
                self.state = message
                self.on_state(message)
            case MetricsText():
                answer = self._renders.get(message.render_id)
                if answer is not None and not answer.done():
                    answer.set_result((message.content_type, message.body))
            case Shutdown():
                if not self.shutdown.done():
                    self.shutdown.set_result(message.deadline_s)
