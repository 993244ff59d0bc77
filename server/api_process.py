"""An API process: serves the HTTP front end on the supervisor's listening socket. Never imports torch.

`python -m server.api_process CONFIG` with an ApiProcessConfig as JSON. Exit codes: 0 after a shutdown, 1 if it cannot
start, and engine.control.EXIT_ORPHANED.
"""

import asyncio
import contextlib
import logging
import resource
import socket
import sys
import time
from pathlib import Path

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.config import ConfigError
from engine.control import become_child
from engine.logs import configure_logging
from engine.messages import ChildFailed, ChildReady, ServiceState
from engine.metrics import MetricsRecorder
from engine.process_config import ApiProcessConfig, read_process_config
from engine.socket_client import SocketEngineClient
from engine.tokenizer import Tokenizer, TokenizerError
from server.app import create_app
from server.app_state import AppState
from server.control import SupervisorLink
from server.http_server import HttpServer
from server.settings import ServeSettings

log = logging.getLogger(__name__)

FLUSH_S = 0.25
KEEP_ALIVE_S = 75
"""Longer than clients and proxies keep idle connections, so that they close them and no request meets a closing one."""
CUT_OFF_S = 2
"""What requests that are cut off at the end of a drain get to say so in."""


class OpenRequests:
    """ASGI middleware that knows how many HTTP requests are open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, counting."""
        self._open += 1
        self._none_open.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            if not self._open:
                self._none_open.set()

    async def finished(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds until no request is open; whether that came to pass."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_open.wait(), timeout_s)
        return not self._open


async def serve_app(app: ASGIApp, listener: socket.socket, link: SupervisorLink, engine: SocketEngineClient) -> None:
    """Serve until the supervisor says Shutdown; then finish what is open, or cut it off at the deadline."""
    requests = OpenRequests(app)
    config = uvicorn.Config(
        requests,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CUT_OFF_S,
    )
    server = HttpServer(config, listener, on_started=lambda: link.send(ChildReady()))

    async def drain() -> None:
        deadline_s = await link.shutdown
        if not await requests.finished(deadline_s):
            log.warning("the drain is over: cutting off the requests that are still open")
            await engine.close()
            await requests.finished(CUT_OFF_S)
        server.should_exit = True

    drainer = asyncio.create_task(drain())
    try:
        await server.serve([])
    finally:
        drainer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drainer


def allow_connections() -> None:
    """Let this process have as many descriptors, so as many connections, as its user may give it without asking."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def flush_for_ever(recorder: MetricsRecorder, index: int) -> None:
    """Send what was counted, every FLUSH_S, and how late that is: as late as all else that this process has to do."""
    while True:
        due = time.monotonic() + FLUSH_S
        await asyncio.sleep(FLUSH_S)
        recorder.observe("event_loop_lag_seconds", max(0.0, time.monotonic() - due), (str(index),))
        recorder.flush()


async def run(config: ApiProcessConfig) -> int:
    """Run the process; returns the exit code."""
    link = await SupervisorLink.connect(Path(config.control_path), config.index)
    try:
        tokenizer = Tokenizer.load(Path(config.model))
    except (ConfigError, TokenizerError) as error:
        link.send(ChildFailed(message=str(error)))
        await link.close()
        return 1
    recorder = MetricsRecorder(link.send)

    async def render_metrics(openmetrics: bool) -> tuple[str, bytes]:
        recorder.flush()  # the same connection: what this process counted until now is in the answer
        return await link.render_metrics(openmetrics)

    engine = SocketEngineClient([Path(path) for path in config.engine_sockets], recorder)
    state = AppState(
        engine=engine,
        tokenizer=tokenizer,
        settings=ServeSettings.model_validate_json(config.settings),
        metrics=recorder,
        render_metrics=render_metrics,
        service=link.state,
    )

    def on_state(service: ServiceState) -> None:
        state.service = service

    link.on_state = on_state
    engine.start()
    flusher = asyncio.create_task(flush_for_ever(recorder, config.index))
    try:
        await serve_app(create_app(state), socket.socket(fileno=config.listen_fd), link, engine)
    finally:
        flusher.cancel()
        await engine.close()
        recorder.flush()
        await link.close()
    return 0


def main(config_path: str) -> int:
    """Run the API process; returns the exit code."""
    become_child()
    config = read_process_config(Path(config_path), ApiProcessConfig)
    configure_logging(config.log, f"api {config.index}")
    allow_connections()
    return uvloop.run(run(config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
