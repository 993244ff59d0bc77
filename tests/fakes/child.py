"""A child process for tests of the supervisor: does what its last argument says and notes what it was told.

`python -m tests.fakes.child CONTROL_SOCKET ROLE INDEX NOTES BEHAVIOUR`. NOTES is a file that gets a line per event.
"""

import os
import sys
import threading
import time
from pathlib import Path

import msgspec

from engine.control import ControlChannel, become_child
from engine.messages import ChildFailed, ChildReady, EngineStatus, MetricsIncrement, ServiceState, Shutdown
from engine.types import EngineInfo

INFO = EngineInfo(
    model="/models/fake",
    vocab_size=300,
    block_length=4,
    max_length=64,
    eos_token_id=0,
    device="cpu",
    dtype="float32",
    max_rows=8,
    pages=16,
    page_size=8,
    kv_bytes=1 << 20,
    parameters=1000,
)


class Child:
    """The fake and its notes."""

    def __init__(self, control_path: str, role: str, index: int, notes: Path) -> None:
        self.role = role
        self.index = index
        self._notes = notes
        self._news = threading.Semaphore(0)
        self.note(f"start {os.getpid()}")
        self.channel = ControlChannel.connect(
            Path(control_path), "engine" if role == "engine" else "api", index, on_message=self._news.release
        )

    def note(self, line: str) -> None:
        """Add a line to the notes."""
        with self._notes.open("a") as file:
            file.write(line + "\n")

    def ready(self) -> None:
        """Say so, and count one step and two gauges in every run."""
        self.channel.send(ChildReady(info=INFO if self.role == "engine" else None))
        if self.role == "engine":
            labels = (str(self.index),)
            self.channel.send(
                MetricsIncrement(counters=[("steps_total", labels, 1.0)], gauges=[("requests_running", labels, 3.0)])
            )

    def serve(self) -> float:
        """Note what comes until Shutdown; returns its deadline."""
        while True:
            self._news.acquire()
            for message in self.channel.poll():
                if isinstance(message, Shutdown):
                    self.note(f"shutdown {message.deadline_s:g}")
                    return message.deadline_s
                if isinstance(message, ServiceState):
                    self.note("state " + msgspec.json.encode(message).decode())

    def status(self, age: float | None) -> None:
        """Report a step that has run for `age` seconds, or none."""
        now = time.time()
        self.channel.send(EngineStatus(step_started=None if age is None else now - age, last_step=now))


def main() -> int:
    """Behave as told; returns the exit code."""
    become_child()
    control_path, role, index, notes, behaviour = sys.argv[1:]
    if behaviour == "never connect":
        time.sleep(60)
    child = Child(control_path, role, int(index), Path(notes))
    if behaviour == "crash":
        return 7
    if behaviour == "fail":
        child.channel.send(ChildFailed(message="there is no such model"))
        child.channel.close()
        return 1
    if behaviour == "never ready":
        time.sleep(60)
    if behaviour == "crash unless first" and Path(notes).read_text().count("start") > 1:
        return 7
    child.ready()
    if behaviour in ("die", "crash unless first"):
        child.channel.close()
        return 1
    if behaviour == "break the protocol":
        child.channel.send(MetricsIncrement(counters=[("nonsense", (), 1.0)]))
    if behaviour == "hang":
        child.status(age=0)
    if behaviour == "fall silent":
        child.status(age=None)
    if behaviour == "work":
        child.status(age=0)
        threading.Thread(target=_report_new_steps, args=(child,), daemon=True).start()
    child.serve()
    if behaviour in ("ignore shutdown", "hang"):
        time.sleep(60)
    if behaviour.startswith("drain"):
        time.sleep(float(behaviour.split()[1]))
        child.note("drained")
    child.channel.close()
    return 0


def _report_new_steps(child: Child) -> None:
    while True:
        child.status(age=0.05)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
