"""Starts the real server, all its processes, and looks at it from outside."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 60.0

Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class ServerProcess:
    """A running `blockserve serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metrics(self) -> dict[Series, float]:
        """Every sample of /metrics by (name, sorted labels)."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """One sample, by name without the prefix; 0 where the series does not exist yet."""
        return self.metrics().get((f"blockserve_{name}", tuple(sorted(labels.items()))), 0.0)

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], timeout: float = 20, what: str = "the condition") -> None:
    """Poll until `condition` holds; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout} s"
        time.sleep(0.02)


def spawn(arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """`blockserve serve ARGUMENTS`, its output in `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )


@contextmanager
def start_server(
    tmp_path: Path, *arguments: str, environment: Mapping[str, str] | None = None, device: str | None = "cpu"
) -> Iterator[ServerProcess]:
    """A server that is ready, on `device` unless that is None; terminated afterwards, killed if it does not go."""
    port = free_port()
    log = tmp_path / f"server-{port}.log"
    on_device = [] if device is None else ["--device", device]
    process = spawn(["--port", str(port), *on_device, "--threads", "1", *arguments], log, environment)
    server = ServerProcess(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until(lambda: _ready(server), START_SECONDS, "readiness")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(server: ServerProcess) -> bool:
    assert server.process.poll() is None, f"the server exited: {server.log.read_text()}"
    try:
        return httpx.get(f"{server.url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
