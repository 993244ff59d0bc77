"""Looks at a service from outside once a second: its metrics, and what its processes take."""

import asyncio
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROLES = {"engine.worker": "engine", "server.api_process": "api", "server.cli": "supervisor"}
GAUGES = ("requests_running", "requests_waiting", "kv_pages_used")
COUNTERS = ("preemptions_total", "engine_restarts_total")
MEBIBYTE = 1 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

LEAK_SLACK = 2
"""Descriptors or threads that a process may have more of than when it was warm: a leak has thousands of requests."""
GROWTH, GROWTH_MEBIBYTES = 1.05, 16
"""What memory may grow by from the first to the last quarter of a process's life: a share, and what allocators do."""
START_SECONDS = 300.0
SHORTEST_LIFE = 12
"""Samples. A life that is shorter says nothing of growth."""


@dataclass(frozen=True)
class ProcessState:
    """What one process takes."""

    role: str
    pid: int
    rss: float
    """Mebibytes."""
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Snapshot:
    """One look at everything."""

    time: float
    """Monotonic seconds."""
    processes: dict[str, ProcessState]
    """By role."""
    metrics: dict[str, float]
    """By name without the prefix."""
    device_mebibytes: float | None
    """Memory taken on the GPU, by all processes."""

    @property
    def engine_up(self) -> bool:
        """Whether the engine takes requests."""
        return self.metrics.get("engine_up") == 1

    @property
    def idle(self) -> bool:
        """Whether no request holds a row or waits for one."""
        return not self.metrics.get("requests_running") and not self.metrics.get("requests_waiting")


@dataclass
class Watcher:
    """Takes snapshots of the service whose supervisor is `pid`."""

    url: str
    pid: int
    has_gpu: bool
    snapshots: list[Snapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._http = httpx.AsyncClient(base_url=self.url, timeout=30)

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            self.snapshots.append(await self.look())
            await asyncio.sleep(1)

    async def look(self) -> Snapshot:
        """Look once."""
        metrics = await self._metrics()
        device = await _device_mebibytes() if self.has_gpu else None
        return Snapshot(time.monotonic(), processes_of(self.pid), metrics, device)

    async def until_engine_up(self, besides: int | None = None) -> Snapshot:
        """Look until an engine is up, one with another process id than `besides`. Raises TimeoutError."""
        async with asyncio.timeout(START_SECONDS):
            while True:
                snapshot = await self.look()
                engine = snapshot.processes.get("engine")
                if snapshot.engine_up and engine is not None and engine.pid != besides:
                    return snapshot
                await asyncio.sleep(0.2)

    async def close(self) -> None:
        """Close its connection."""
        await self._http.aclose()

    async def _metrics(self) -> dict[str, float]:
        text = (await self._http.get("/metrics")).text
        wanted = {f"blockserve_{name}": name for name in (*GAUGES, *COUNTERS, "engine_up")}
        return {
            wanted[sample.name]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in wanted
        }


def processes_of(supervisor: int) -> dict[str, ProcessState]:
    """The supervisor and its children by role."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        try:
            if pid != supervisor and _parent(path) != supervisor:
                continue
            state = _state(path, pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended
        if state is not None:
            found[state.role] = state
    return found


def _parent(path: Path) -> int:
    # The name, in brackets, may hold anything.
    return int((path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])


def _state(path: Path, pid: int) -> ProcessState | None:
    command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
    role = next((role for module, role in ROLES.items() if module in command), None)
    if role is None:
        return None
    rss = int((path / "statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES / MEBIBYTE
    return ProcessState(role, pid, rss, len(list((path / "fd").iterdir())), len(list((path / "task").iterdir())))


async def _device_mebibytes() -> float:
    process = await asyncio.create_subprocess_exec(
        "nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate()
    return float(output.decode())


def growth(snapshots: list[Snapshot]) -> dict[str, tuple[float, float]]:
    """Memory in the first and the last quarter of each process's life under load, median mebibytes.

    The first quarter of what was seen of a life is left out: buffers are allocated and graphs captured then.
    """
    lives: dict[str, list[float]] = {}
    for snapshot in snapshots:
        if not snapshot.engine_up:
            continue
        for process in snapshot.processes.values():
            lives.setdefault(f"{process.role} {process.pid}", []).append(process.rss)
        if snapshot.device_mebibytes is not None and (engine := snapshot.processes.get("engine")) is not None:
            lives.setdefault(f"GPU under engine {engine.pid}", []).append(snapshot.device_mebibytes)
    found = {}
    for name, values in lives.items():
        settled = values[len(values) // 4 :]
        quarter = len(settled) // 4
        if len(values) >= SHORTEST_LIFE:
            found[name] = statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])
    return found


def leaks(warm: Snapshot, last: Snapshot) -> list[str]:
    """What the idle service has more of than when it was idle and warm."""
    found = [f"{name} is {last.metrics.get(name)}" for name in GAUGES if last.metrics.get(name) != 0]
    for role, before in warm.processes.items():
        after = last.processes.get(role)
        if after is None:
            found.append(f"there is no {role} process")
            continue
        for what in ("descriptors", "threads"):
            least, most = getattr(before, what), getattr(after, what)
            if most > least + LEAK_SLACK:
                found.append(f"{role} has {most} {what}, and had {least}")
    return found


def grown(first: float, last: float) -> bool:
    """Whether memory grew from one quarter to the other by more than noise."""
    return last > first * GROWTH + GROWTH_MEBIBYTES
