"""The engine process: serves one EngineCore to API processes over a socket. Started by the supervisor.

`python -m engine.worker CONFIG`, an EngineProcessConfig as JSON. Exit codes: 0 after a shutdown, 1 if it cannot start
or a step fails.
"""

import gc
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine.config import ConfigError, ModelConfig
from engine.control import ControlChannel, become_child, leave
from engine.deltas import StepDeltas
from engine.listener import Connected, Disconnected, MessageListener
from engine.logs import configure_logging
from engine.messages import (
    Abort,
    Accepted,
    ChildFailed,
    ChildReady,
    Deltas,
    EngineHello,
    EngineStatus,
    Rejected,
    Shutdown,
    Submit,
    ToEngine,
)
from engine.meter import EngineMeter
from engine.metrics import MetricsRecorder
from engine.model_files import read_ahead
from engine.process_config import EngineProcessConfig, read_process_config
from engine.scheduler import QueueFullError
from engine.types import Delta, InvalidRequestError
from engine.watchdog import StepWatchdog, step_fields

if TYPE_CHECKING:
    from engine.core import EngineCore

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.5


class StepFailedError(Exception):
    """A step raised an exception that nothing accounts for; the engine's state is not to be trusted any more."""


class EngineWorker:
    """The loop: take messages, run a step, hand out what it wrote."""

    def __init__(
        self,
        core: "EngineCore",
        listener: MessageListener,
        control: ControlChannel,
        index: int,
        step_timeout_s: float = 60.0,
    ) -> None:
        """A step that takes longer than `step_timeout_s` seconds is logged, while it does, by `report_status`."""
        self._core = core
        self._listener = listener
        self._control = control
        self._open: dict[int, set[int]] = {}
        self._meter = EngineMeter(core.info, MetricsRecorder(control.send), (str(index),))
        self._deadline: float | None = None
        self.watchdog = StepWatchdog(step_timeout_s, lambda: core.step_underway)
        self.step_started: float | None = None
        self.last_step = time.time()

    def run(self) -> None:
        """Serve until a Shutdown message and the end of the open work, or its deadline.

        Raises StepFailedError, logged with the step and its requests, where a step fails.
        """
        while not self._finished():
            self.turn(0.0 if self._core.has_work else self._meter.idle_timeout())

    def turn(self, timeout: float | None) -> None:
        """One turn of the loop: take the messages that come within `timeout` seconds (None: wait), and run a step."""
        core = self._core
        load_before = core.load_now
        for peer_id, message in self._listener.poll(timeout):
            self._handle(peer_id, message)
        for control_message in self._control.poll():
            if isinstance(control_message, Shutdown):
                self._deadline = time.monotonic() + control_message.deadline_s
        delivered = self._step()
        if not delivered and core.load_now != load_before:
            self._publish(None)
        self._meter.tick(core.load_now, core.totals, idle=not core.has_work)

    def _finished(self) -> bool:
        if self._deadline is None:
            return False
        return not self._core.has_work or time.monotonic() > self._deadline

    def _handle(self, peer_id: int, message: ToEngine | Connected | Disconnected) -> None:
        match message:
            case Connected():
                self._open[peer_id] = set()
                self._listener.send(peer_id, EngineHello(info=self._core.info))
            case Disconnected():
                for request_id in self._open.pop(peer_id, ()):
                    self._core.abort((peer_id, request_id))
            case Submit() if peer_id in self._open:
                self._listener.send(peer_id, self._submit(peer_id, message))
            case Abort() if peer_id in self._open:
                for request_id in message.request_ids:
                    self._core.abort((peer_id, request_id))
                    self._open[peer_id].discard(request_id)

    def _submit(self, peer_id: int, message: Submit) -> Accepted | Rejected:
        ids = [one.request_id for one in message.requests] + [one.request_id for one in message.scores]
        group = message.group_id
        if self._deadline is not None:
            return Rejected(group_id=group, code="unavailable", message="the server is shutting down")
        if not ids or len(set(ids)) != len(ids) or not self._open[peer_id].isdisjoint(ids):
            text = "a group needs at least one request, each with an id that no open request has"
            return Rejected(group_id=group, code="invalid", message=text, param="request_id")
        try:
            self._core.add(
                [((peer_id, request.request_id), request) for request in message.requests],
                [((peer_id, request.request_id), request) for request in message.scores],
            )
        except InvalidRequestError as error:
            return Rejected(group_id=group, code="invalid", message=error.message, param=error.param)
        except QueueFullError as error:
            return Rejected(group_id=group, code="queue_full", message=str(error))
        self._open[peer_id].update(ids)
        return Accepted(group_id=group)

    def _step(self) -> bool:
        """Run one step if there is work; whether anything was sent."""
        self.step_started = time.time()
        self.watchdog.begin()
        try:
            report = self._core.step()
        except Exception as error:
            fields = step_fields(self._core.step_underway)
            log.exception("a step failed, and with it the engine", extra=fields)
            raise StepFailedError("a step failed") from error
        self.watchdog.end()
        self.step_started = None
        if report is None:
            return False
        self.last_step = time.time()
        singly = [(sequence.key, delta) for sequence, delta in report.deltas.others] + report.scored
        for key, delta in singly:
            peer_id, request_id = _peer_and_id(key)
            if delta.finish_reason is not None and peer_id in self._open:
                self._open[peer_id].discard(request_id)
        self._meter.count_step(rows=report.rows, tokens=report.deltas.tokens, seconds=report.seconds)
        self._publish(report.deltas, singly)
        return bool(report.deltas or report.scored)

    def _publish(self, deltas: StepDeltas | None, singly: Seq[tuple[Hashable, Delta]] = ()) -> None:
        load = self._core.load_now
        parts = {} if deltas is None else _by_peer(deltas, singly)
        for peer_id in self._open:
            part = parts.get(peer_id, _PeerDeltas())
            blocks = b"" if deltas is None else deltas.blocks[part.places].tobytes()
            self._listener.send(
                peer_id, Deltas(deltas=part.deltas, request_ids=part.request_ids, blocks=blocks, load=load)
            )


@dataclass
class _PeerDeltas:
    """A peer's part of a step."""

    deltas: list[Delta] = field(default_factory=list)
    request_ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Which of the step's blocks go to `request_ids`."""


def _by_peer(deltas: StepDeltas, singly: Seq[tuple[Hashable, Delta]]) -> dict[int, _PeerDeltas]:
    """What goes to each peer: the whole blocks of `deltas`, and `singly`, by key, all else that a step gave."""
    parts: dict[int, _PeerDeltas] = defaultdict(_PeerDeltas)
    for key, delta in singly:
        parts[_peer_and_id(key)[0]].deltas.append(delta)
    for place, sequence in enumerate(deltas.sequences):
        peer_id, request_id = _peer_and_id(sequence.key)
        part = parts[peer_id]
        part.request_ids.append(request_id)
        part.places.append(place)
    return parts


def _peer_and_id(key: Hashable) -> tuple[int, int]:
    return cast(tuple[int, int], key)  # the keys are those that _submit made


def report_status(worker: EngineWorker, control: ControlChannel, stop: threading.Event) -> None:
    """Tell the supervisor that this process lives, and watch its steps, until `stop` is set; in a thread of its own."""
    while True:
        control.send(EngineStatus(step_started=worker.step_started, last_step=worker.last_step))
        worker.watchdog.check()
        if stop.wait(STATUS_SECONDS):
            return


def _load_core(config: EngineProcessConfig) -> "EngineCore":
    directory = Path(config.model)
    if config.random_seed is None:
        read_ahead(directory)
    # torch takes seconds to import: the control channel has to be up before that, so that a supervisor that dies
    # meanwhile is noticed.
    import torch

    from engine.core import EngineCore
    from engine.options import resolve_options

    # A core is left to the front end: where both want the same one, each step waits at every product for a thread that
    # does not run, ten times as long as the step takes.
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    engine_config = resolve_options(config.options, ModelConfig.load(directory))
    return EngineCore.load(config.name, directory, engine_config, config.random_seed)


def main(config_path: str) -> int:
    """Run the engine process; returns the exit code."""
    become_child()
    config = read_process_config(Path(config_path), EngineProcessConfig)
    configure_logging(config.log, f"engine {config.index}")
    listener = MessageListener()
    control = ControlChannel.connect(Path(config.control_path), "engine", config.index, on_message=listener.wake)
    try:
        core = _load_core(config)
    except ConfigError as error:
        control.send(ChildFailed(message=str(error)))
        control.close()
        return 1
    listener.listen(Path(config.socket_path))
    worker = EngineWorker(core, listener, control, config.index, config.step_timeout_s)
    stopped = threading.Event()
    threading.Thread(target=report_status, args=(worker, control, stopped), daemon=True).start()
    # What start-up made stays for good: without it, collecting garbage costs a step as much again as committing it.
    gc.freeze()
    control.send(ChildReady(info=core.info))
    try:
        worker.run()
    except StepFailedError:
        return 1
    finally:
        stopped.set()
        listener.close()
        control.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1]))
