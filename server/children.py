"""The supervisor's children: what is started, how it ended, and when it may be started again."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["engine", "api"]


@dataclass(frozen=True)
class ChildSpec:
    """How to start one process of the service."""

    role: Role
    index: int
    command: tuple[str, ...]
    pass_fds: tuple[int, ...] = ()
    stale_files: tuple[Path, ...] = ()
    """What a predecessor that was killed may have left, removed before a start."""

    @property
    def name(self) -> str:
        """What the logs call it."""
        return f"{self.role} {self.index}"


@dataclass(frozen=True)
class RestartPolicy:
    """When a child that died is started again."""

    first_delay_s: float = 0.5
    """Doubles with every further death in a row."""
    longest_delay_s: float = 30.0
    reset_after_s: float = 60.0
    """A child that was ready for so long starts a new row."""
    attempts: int = 5
    """Restarts in a row. After the last one, the service gives up."""


class Restarts:
    """The restarts of one child."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._in_a_row = 0

    def next_delay(self, seconds_ready: float) -> float | None:
        """Seconds to wait before the next start, for a child that died after working `seconds_ready`. None: give up."""
        if seconds_ready >= self._policy.reset_after_s:
            self._in_a_row = 0
        if self._in_a_row >= self._policy.attempts:
            return None
        self._in_a_row += 1
        delay = self._policy.first_delay_s * 2.0 ** (self._in_a_row - 1)
        return min(delay, self._policy.longest_delay_s)


class ChildProcess:
    """One run of a child, from its start to its exit. In a session of its own: Ctrl-C does not reach it."""

    def __init__(self, spec: ChildSpec) -> None:
        """Start it. To be called by the main thread (the kernel kills children with the thread that started them)."""
        for path in spec.stale_files:
            path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            spec.command,
            stdin=subprocess.DEVNULL,
            env=child_environment(),
            pass_fds=spec.pass_fds,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.ready_since: float | None = None
        """When it said that it is ready (monotonic seconds)."""
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._wait, args=(asyncio.get_running_loop(),), daemon=True).start()

    @property
    def seconds_ready(self) -> float:
        """How long it has been ready; 0 if it is not."""
        return 0.0 if self.ready_since is None else time.monotonic() - self.ready_since

    @property
    def exited(self) -> bool:
        """Whether it is gone."""
        return self._exit.done()

    async def wait(self) -> int:
        """Its exit code, once it is gone: the negated signal's number if one killed it."""
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        """End it at once."""
        if not self.exited:
            self._process.kill()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop may be closed: then nobody asks any more
            loop.call_soon_threadsafe(self._exit.set_result, code)


def module_command(module: str, config_path: Path) -> tuple[str, ...]:
    """Run a module of ours, whatever lies in the working directory."""
    return (sys.executable, "-P", "-m", module, str(config_path))


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child finds the same code as this process runs."""
    environment = dict(os.environ)
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(root) if not inherited else f"{root}{os.pathsep}{inherited}"
    return environment


def describe_exit(code: int) -> str:
    """How a process ended, for a log line: "exited with code 1", "was killed by SIGKILL"."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
