"""The front end's connection to the engine processes. Torch-free; asyncio."""

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from time import monotonic

import msgspec

from engine.client import EngineRejectedError, EngineUnavailableError
from engine.messages import (
    Abort,
    Accepted,
    Deltas,
    EngineHello,
    FromEngine,
    ProtocolError,
    Rejected,
    Submit,
    ToEngine,
    encode_frame,
    from_engine_reader,
)
from engine.metrics import MetricsRecorder
from engine.router import choose_engine, preferred_engine, prefix_slack
from engine.types import Delta, EngineInfo, EngineLoad, GenerationRequest, ScoreRequest

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05
READ_BYTES = 1 << 18
BEHIND_SECONDS = 1.0
"""A reader that was held up for a moment, as by its own process, has caught up long before."""


class SocketAnswers:
    """The open answers of one accepted group."""

    def __init__(self, connection: "_Connection", request_ids: Sequence[int]) -> None:
        self._connection = connection
        self._open = set(request_ids)
        self._arrived: asyncio.Queue[list[Delta] | EngineUnavailableError] = asyncio.Queue()
        self._most_unread: float = math.inf
        self._exceeded: Callable[[], None] = lambda: None
        self._behind_since = math.inf

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What the engine delivers, step by step. Raises EngineUnavailableError if the engine dies first."""
        while self._open:
            item = await self._arrived.get()
            if isinstance(item, EngineUnavailableError):
                raise item
            item = [delta for delta in item if delta.request_id in self._open]
            self._open.difference_update(delta.request_id for delta in item if delta.finish_reason is not None)
            if item:
                yield item

    def limit_unread(self, steps: int, exceeded: Callable[[], None]) -> None:
        """Call `exceeded`, once, if more than `steps` steps have been waiting in `deltas` for a second."""
        self._most_unread, self._exceeded = steps, exceeded

    def abort(self, request_ids: Sequence[int] | None = None) -> None:
        """Tell the engine to forget these requests (None: all that are open). Their deltas stop at once."""
        gone = self._open & set(request_ids) if request_ids is not None else set(self._open)
        self._open -= gone
        if gone:
            self._connection.abort(gone)
            # Wakes a reader whose last answers were aborted while it waited.
            self._arrived.put_nowait([])

    def deliver(self, item: list[Delta] | EngineUnavailableError) -> None:
        """Called by the connection."""
        self._arrived.put_nowait(item)
        if self._arrived.qsize() <= self._most_unread:
            self._behind_since = math.inf
            return
        now = monotonic()
        self._behind_since = min(self._behind_since, now)
        if now - self._behind_since >= BEHIND_SECONDS:
            self._most_unread = math.inf
            self._exceeded()


class _Connection:
    """One engine process, seen from this process; reconnects for ever."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, SocketAnswers] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self.up = False
        self.info: EngineInfo | None = None
        self.load = EngineLoad()
        self.unseen = 0
        """Requests that were sent since the engine last said how busy it is."""

    @property
    def expected_load(self) -> EngineLoad:
        """The load with what is on its way: else all of a burst would go to the same engine."""
        return msgspec.structs.replace(self.load, running=self.load.running + self.unseen)

    async def run(self) -> None:
        """Connect, read until the engine is gone, and again."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self._path))
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                await self._read(reader)
            except (OSError, ProtocolError) as error:
                log.error("the connection to an engine broke: %s", error)
            finally:
                self._lost()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def submit(
        self, group_id: int, requests: Sequence[GenerationRequest], scores: Sequence[ScoreRequest]
    ) -> SocketAnswers:
        request_ids = [request.request_id for request in requests] + [score.request_id for score in scores]
        answers = SocketAnswers(self, request_ids)
        accepted = self._waiting[group_id] = asyncio.get_running_loop().create_future()
        self._answers.update((request_id, answers) for request_id in request_ids)
        self.unseen += len(request_ids)
        self._send(Submit(group_id=group_id, requests=list(requests), scores=list(scores)))
        try:
            await accepted
        except BaseException:
            # Rejected, or the caller was cancelled: then the engine may own the group already, or be about to.
            answers.abort()
            raise
        finally:
            self._waiting.pop(group_id, None)
        return answers

    def abort(self, request_ids: set[int]) -> None:
        for request_id in request_ids:
            self._answers.pop(request_id, None)
        self._send(Abort(request_ids=sorted(request_ids)))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = from_engine_reader()
        while data := await reader.read(READ_BYTES):
            for message in frames.feed(data):
                self._handle(message)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case EngineHello():
                self.info, self.up = message.info, True
            case Accepted():
                self._settle(message.group_id, None)
            case Rejected():
                self._settle(message.group_id, EngineRejectedError(message.code, message.message, message.param))
            case Deltas():
                self.load, self.unseen = message.load, 0
                self._deliver(message.unpacked())

    def _settle(self, group_id: int, error: Exception | None) -> None:
        accepted = self._waiting.pop(group_id, None)
        if accepted is None or accepted.done():
            return
        if error is None:
            accepted.set_result(None)
        else:
            accepted.set_exception(error)

    def _deliver(self, deltas: list[Delta]) -> None:
        by_group: dict[SocketAnswers, list[Delta]] = {}
        for delta in deltas:
            answers = self._answers.get(delta.request_id)
            if answers is None:
                continue
            by_group.setdefault(answers, []).append(delta)
            if delta.finish_reason is not None:
                del self._answers[delta.request_id]
        for answers, own in by_group.items():
            answers.deliver(own)

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    def _lost(self) -> None:
        self.up = False
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        error = EngineUnavailableError("the engine that served this request has stopped; try again")
        waiting, self._waiting = self._waiting, {}
        for accepted in waiting.values():
            if not accepted.done():
                accepted.set_exception(error)
        open_answers, self._answers = set(self._answers.values()), {}
        for answers in open_answers:
            answers.deliver(error)
        self.load, self.unseen = EngineLoad(), 0


class SocketEngineClient:
    """The `EngineClient` of an API process: one connection to each engine process."""

    def __init__(self, paths: Sequence[Path], metrics: MetricsRecorder) -> None:
        self._connections = [_Connection(path) for path in paths]
        self._metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []
        self._request_ids = itertools.count()
        self._group_ids = itertools.count()

    @property
    def info(self) -> EngineInfo | None:
        """What is served; None until the first engine has said so. Kept while engines restart."""
        return next((c.info for c in self._connections if c.info is not None), None)

    @property
    def up(self) -> bool:
        """Whether this process is connected to an engine."""
        return any(connection.up for connection in self._connections)

    @property
    def load(self) -> EngineLoad:
        """How busy the engines are, added up, as they last said: after a step, and whenever a request comes or goes."""
        loads = [connection.load for connection in self._connections]
        return EngineLoad(
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            pages_used=sum(load.pages_used for load in loads),
        )

    def start(self) -> None:
        """Begin to connect. Needs a running event loop."""
        self._tasks = [asyncio.create_task(connection.run()) for connection in self._connections]

    async def close(self) -> None:
        """Disconnect; the engines abort what is open."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def next_request_id(self) -> int:
        """An id that no other request of this process has."""
        return next(self._request_ids)

    async def submit(self, requests: Sequence[GenerationRequest], scores: Sequence[ScoreRequest] = ()) -> SocketAnswers:
        """Hand a group to an engine, which takes all of it or nothing; one whose queue is full leaves it to another.

        Raises EngineRejectedError with the engine's reason, or EngineUnavailableError if no engine is up.
        """
        full: EngineRejectedError | None = None
        asked: list[_Connection] = []
        while up := [connection for connection in self._connections if connection.up and connection not in asked]:
            connection, by_prefix = self._choose(up, requests[0] if requests else None)
            try:
                answers = await connection.submit(next(self._group_ids), requests, scores)
            except EngineRejectedError as error:
                if error.code != "queue_full":
                    raise
                full = error
                asked.append(connection)
            else:
                engine = str(self._connections.index(connection))
                number, reason = len(requests) + len(scores), "prefix" if by_prefix else "load"
                self._metrics.count("requests_routed_total", number, (engine, reason))
                return answers
        raise full or EngineUnavailableError("no engine is ready to take requests; try again in a moment")

    def _choose(self, up: Sequence[_Connection], request: GenerationRequest | None) -> tuple[_Connection, bool]:
        """The engine for a group that begins with `request` (None: of scores only), and whether its prefix decided."""
        preferred, slack, info = None, 0, up[0].info
        if len(up) > 1 and info is not None and request is not None:
            numbers = [self._connections.index(connection) for connection in up]
            preferred = preferred_engine(request, numbers, info.page_size * info.block_length)
            slack = prefix_slack(info)
        choice = choose_engine([connection.expected_load for connection in up], preferred, slack)
        return up[choice.place], choice.by_prefix
