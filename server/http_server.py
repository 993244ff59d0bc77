"""uvicorn's server in an API process: whoever waits to be connected is taken up in one turn of the event loop.

Left to uvloop, a listening socket gives up one connection a turn, and turns are long where a thousand streams are fed:
a probe would wait behind all who connected before it.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn

from server.http_protocol import ClientProtocol

log = logging.getLogger(__name__)

ACCEPTS_A_TURN = 64
PAUSE_S = 1.0
"""Until the next try where the system gives no connection, for want of descriptors or of memory."""


class HttpServer(uvicorn.Server):
    """uvicorn, but it accepts connections by itself, and signals are the supervisor's business."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, on_started: Callable[[], None]) -> None:
        """`on_started` is called once connections of `listener` are accepted. To be served without sockets."""
        super().__init__(config)
        self._listener = listener
        self._on_started = on_started
        self._resumed: asyncio.TimerHandle | None = None
        self._taking_up: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        assert sockets == []
        await super().startup(sockets)
        self._listener.setblocking(False)
        self._resume()
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more of them, and finish those that are there."""
        if self._resumed is not None:
            self._resumed.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        await super().shutdown(sockets)

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_A_TURN):
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue  # its client has left
            except OSError as error:
                log.error("no connection can be accepted, next try in %g s: %s", PAUSE_S, error)
                loop.remove_reader(self._listener)
                self._resumed = loop.call_later(PAUSE_S, self._resume)
                return
            connection.setblocking(False)
            task = loop.create_task(self._take_up(connection))
            self._taking_up.add(task)
            task.add_done_callback(self._taking_up.discard)

    async def _take_up(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        except OSError:
            connection.close()  # its client has left

    def _protocol(self) -> ClientProtocol:
        return ClientProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
