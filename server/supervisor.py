"""The supervisor: starts the processes of the service, watches them, starts them again, and stops them in order.

It serves no HTTP and never imports torch. Exit codes: 0 after SIGTERM, SIGHUP or Ctrl-C; 1 if the service cannot start,
a process keeps dying or a step hangs; 128 + the signal's number if a second signal cut the drain short.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.messages import (
    ChildFailed,
    ChildReady,
    EngineStatus,
    MetricsIncrement,
    MetricsText,
    ProtocolError,
    RenderMetrics,
    ServiceState,
    Shutdown,
    ToSupervisor,
)
from engine.metrics import ENGINE, METRICS
from engine.types import EngineInfo
from server.children import ChildProcess, ChildSpec, RestartPolicy, Restarts, describe_exit
from server.control_server import ControlLink
from server.exit_codes import EXIT_DONE, EXIT_FAILED
from server.metrics_registry import MetricStore

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class SupervisorOptions:
    """Times in seconds."""

    drain_timeout_s: float = 30.0
    """What open requests get to finish in."""
    step_timeout_s: float = 60.0
    """A step that takes longer hangs."""
    red_s: float = 5.0
    """How long a service that failed still answers /health with its failure."""
    exit_margin_s: float = 5.0
    """What a process gets to exit in, once its deadline is over, before it is killed."""
    orphan_s: float = 2.0
    """What a child that lost its control connection gets to exit in."""
    restarts: RestartPolicy = field(default_factory=RestartPolicy)


class Place:
    """One place in the service: the process in it now, if any, and its connection."""

    def __init__(self, spec: ChildSpec, policy: RestartPolicy) -> None:
        self.spec = spec
        self.restarts = Restarts(policy)
        self.process: ChildProcess | None = None
        self.link: ControlLink | None = None
        self.greeted = asyncio.Event()
        """Set while there is a link."""
        self.info: EngineInfo | None = None
        self.was_ready = False
        self.step_began: float | None = None
        """When the engine's step in flight began (monotonic seconds)."""
        self.last_sign: float | None = None
        """When the engine last gave a sign of life (monotonic seconds)."""

    @property
    def ready(self) -> bool:
        """Whether its process can do its work."""
        connected = self.link is not None and not self.link.closed.is_set()
        return connected and self.process is not None and self.process.ready_since is not None

    @property
    def source(self) -> str:
        """Names the process in it now, for the metrics."""
        return f"{self.spec.name} pid {self.process.pid if self.process else None}"


class Supervisor:
    """Runs a service until it is told to stop or cannot go on. Handles its children's messages (`ControlHandler`)."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        options: SupervisorOptions,
        metrics: MetricStore,
        on_all_ready: Callable[[EngineInfo], None],
        on_front_end_stopped: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_all_ready` is called once, with the first engine's account of itself."""
        self._places = [Place(spec, options.restarts) for spec in specs]
        self._options = options
        self._metrics = metrics
        self._on_all_ready = on_all_ready
        self._on_front_end_stopped = on_front_end_stopped
        self._announced = False
        self._draining = False
        self._failure = ""
        self._exit_code = EXIT_DONE
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()

    async def run(self) -> int:
        """Start everything; returns the exit code once all is stopped. A ControlServer has to listen already."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.signalled, number)
        for place in self._engines():
            self._gauge_up(place, 0)
            self._metrics.apply(_zero_counters(place), "supervisor")
        keepers = [asyncio.create_task(self._keep(place)) for place in self._places]
        watcher = asyncio.create_task(self._watch_steps())
        for task in (*keepers, watcher):
            task.add_done_callback(self._task_ended)
        try:
            await self._stopping.wait()
            await self._stop()
        finally:
            for place in self._places:
                if place.process is not None:
                    place.process.kill()
            watcher.cancel()
            await asyncio.gather(*keepers, watcher, return_exceptions=True)
            for number in SIGNALS:
                loop.remove_signal_handler(number)
        return self._exit_code

    def signalled(self, number: int) -> None:
        """The first signal drains, the second one stops at once."""
        name = signal.Signals(number).name
        if not self._stopping.is_set():
            log.info("%s: finishing what is open; once more to stop at once", name)
            self.stop()
        else:
            log.warning("%s: stopping at once", name)
            self._exit_code = self._exit_code or 128 + number
            self._hurried.set()

    def stop(self) -> None:
        """Drain, unless it is stopping already."""
        if not self._stopping.is_set():
            self._draining = True
            self._stopping.set()
            self._publish()

    # --- what children say (ControlHandler) ---

    def connected(self, link: ControlLink) -> None:
        """Take the connection of a child that was started here."""
        hello = link.hello
        for place in self._places:
            spec, process = place.spec, place.process
            if (
                (spec.role, spec.index) == (hello.role, hello.index)
                and process is not None
                and process.pid == hello.pid
            ):
                break
        else:
            raise ProtocolError(f"process {hello.pid} is not a child of this service")
        if place.link is not None:
            raise ProtocolError("the child is connected already")
        place.link = link
        place.greeted.set()
        link.send(self._state())

    def received(self, link: ControlLink, message: ToSupervisor) -> None:
        """Act on a child's message."""
        place = self._place_of(link)
        if place is None:
            raise ProtocolError("a message of a process that is gone")
        match message:
            case ChildReady():
                self._became_ready(place, message.info)
            case ChildFailed():
                what = f"{place.spec.name} cannot start"
                # The reason may name files, which clients are not told of.
                self._fail(f"{what}: {message.message}", public=f"{what}; the log says why")
            case EngineStatus():
                place.step_began, place.last_sign = _began(message), time.monotonic()
            case MetricsIncrement():
                self._metrics.apply(message, place.source)
            case RenderMetrics():
                content_type, body = self._metrics.render(message.openmetrics)
                link.send(MetricsText(render_id=message.render_id, content_type=content_type, body=body))
            case _:
                raise ProtocolError(f"{type(message).__name__} after the first message")

    def disconnected(self, link: ControlLink) -> None:
        """A child without a connection has to exit."""
        place = self._place_of(link)
        if place is not None and place.process is not None and not place.process.exited:
            asyncio.get_running_loop().call_later(self._options.orphan_s, place.process.kill)

    def _place_of(self, link: ControlLink) -> Place | None:
        return next((place for place in self._places if place.link is link), None)

    def _became_ready(self, place: Place, info: EngineInfo | None) -> None:
        if place.process is None or (place.spec.role == "engine") != (info is not None):
            raise ProtocolError("an engine says what it serves when it is ready, and nobody else does")
        place.process.ready_since = time.monotonic()
        place.info = info
        place.was_ready = True
        log.info("%s is ready", place.spec.name)
        if place.spec.role == "engine":
            self._gauge_up(place, 1)
        self._publish()
        if not self._announced and all(other.was_ready for other in self._places):
            self._announced = True
            first = next((other.info for other in self._engines() if other.info is not None), None)
            if first is not None:
                self._on_all_ready(first)

    # --- one place ---

    async def _keep(self, place: Place) -> None:
        """Keep a process in a place until the service stops."""
        while not self._stopping.is_set():
            try:
                process = place.process = ChildProcess(place.spec)
            except OSError as error:
                self._fail(f"{place.spec.name} cannot be started: {error.strerror}")
                return
            log.info("%s starts", place.spec.name, extra={"pid": process.pid})
            code = await process.wait()
            await self._clear(place)
            if self._stopping.is_set():
                return
            delay = self._after_exit(place, process, code)
            if delay is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), delay)

    async def _clear(self, place: Place) -> None:
        """Take a process that exited out of its place, once all it has sent is read."""
        with contextlib.suppress(TimeoutError):
            # Its exit may be known before its first message is read.
            await asyncio.wait_for(place.greeted.wait(), 0.25)
        if place.link is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(place.link.closed.wait(), 1)
            place.link.close()
        place.greeted.clear()
        self._metrics.forget_gauges(place.source)
        place.link = place.process = place.step_began = place.last_sign = None
        if place.spec.role == "engine":
            self._gauge_up(place, 0)
        self._publish()

    def _after_exit(self, place: Place, process: ChildProcess, code: int) -> float | None:
        """Seconds until the next start after an exit that nobody asked for; None if the service gives up."""
        what = f"{place.spec.name} {describe_exit(code)}"
        if not place.was_ready and code >= 0:
            # It ended itself before it ever worked: it would again.
            self._fail(f"{what} before it was ready")
            return None
        delay = place.restarts.next_delay(process.seconds_ready)
        if delay is None:
            self._fail(f"{what}, as after each of its last {self._options.restarts.attempts} restarts")
            return None
        log.error("%s; starting it again in %g s", what, delay)
        if place.spec.role == "engine":
            self._metrics.apply(MetricsIncrement(counters=[("engine_restarts_total", _labels(place), 1)]), "supervisor")
        return delay

    async def _watch_steps(self) -> None:
        """Give up when a step hangs: a busy engine reports every step anew, a hung one the same step or nothing."""
        limit = self._options.step_timeout_s
        interval = min(1.0, limit / 4)
        while True:
            before = time.monotonic()
            await asyncio.sleep(interval)
            now = time.monotonic()
            if now - before > interval + limit / 2:
                continue  # this process was stopped itself: what it has not read yet is no silence
            for place in self._engines():
                if place.step_began is not None and now - place.step_began > limit:
                    self._fail(f"{place.spec.name} hangs: a step has taken more than {limit:g} s")
                elif place.last_sign is not None and now - place.last_sign > limit:
                    self._fail(f"{place.spec.name} hangs: no sign of life for more than {limit:g} s")

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the supervisor failed", exc_info=error)
            self._fail("the supervisor failed; its log says why")

    # --- the whole ---

    def _fail(self, message: str, public: str | None = None) -> None:
        """Log why the service ends, and tell clients of it, in other words if `public` is given."""
        if self._stopping.is_set():
            return
        log.error("%s", message)
        self._failure = public or message
        self._exit_code = EXIT_FAILED
        self._stopping.set()
        self._publish()

    async def _stop(self) -> None:
        """Stop the front end once its open requests are done, then the engines."""
        if self._failure and self._announced:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurried.wait(), self._options.red_s)
        deadline_s = 0.0 if self._failure else self._options.drain_timeout_s
        await self._stop_places([place for place in self._places if place.spec.role == "api"], deadline_s)
        self._on_front_end_stopped()
        await self._stop_places(list(self._engines()), 0.0)
        log.info("stopped")

    async def _stop_places(self, places: list[Place], deadline_s: float) -> None:
        """Ask processes to exit within `deadline_s`; kill those that do not, or that cannot be asked."""
        waits: list[asyncio.Future[int]] = []
        for place in places:
            if place.process is None or place.process.exited:
                continue
            waits.append(asyncio.create_task(place.process.wait()))
            if place.link is not None and place.ready:
                place.link.send(Shutdown(deadline_s=deadline_s))
            else:
                place.process.kill()
        if not waits:
            return
        everyone = asyncio.ensure_future(asyncio.wait(waits))
        hurried = asyncio.ensure_future(self._hurried.wait())
        timeout = deadline_s + self._options.exit_margin_s
        await asyncio.wait([everyone, hurried], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        for place in places:
            if place.process is not None and not place.process.exited:
                if not self._hurried.is_set():
                    log.warning("%s did not exit in time: killing it", place.spec.name)
                place.process.kill()
        await everyone

    def _engines(self) -> Iterable[Place]:
        return (place for place in self._places if place.spec.role == "engine")

    def _state(self) -> ServiceState:
        up = sum(place.ready for place in self._engines())
        detail = self._failure
        if not detail and self._draining:
            detail = "the server is shutting down"
        elif not detail and not up:
            detail = "no engine is up"
        return ServiceState(healthy=not self._failure, engines_up=up, draining=self._draining, detail=detail)

    def _publish(self) -> None:
        state = self._state()
        for place in self._places:
            if place.link is not None:
                place.link.send(state)

    def _gauge_up(self, place: Place, value: int) -> None:
        self._metrics.apply(MetricsIncrement(gauges=[("engine_up", _labels(place), value)]), "supervisor")


def _zero_counters(place: Place) -> MetricsIncrement:
    """Every counter of an engine, so that its series are there before the first event, as rates need them."""
    names = [name for name, metric in METRICS.items() if metric.kind == "counter" and metric.labels == ENGINE]
    return MetricsIncrement(counters=[(name, _labels(place), 0.0) for name in names])


def _labels(place: Place) -> tuple[str, ...]:
    return (str(place.spec.index),)


def _began(status: EngineStatus) -> float | None:
    """The start of the step in flight on this process's monotonic clock, which nobody sets back."""
    if status.step_started is None:
        return None
    return time.monotonic() - max(0.0, time.time() - status.step_started)
