"""The supervisor and its children, with small fake children in place of engines and API processes."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.messages import ServiceState
from engine.types import EngineInfo
from server.children import ChildSpec, RestartPolicy
from server.control_server import ControlServer
from server.metrics_registry import MetricStore
from server.supervisor import Supervisor, SupervisorOptions
from tests.fakes.child import INFO
from tests.fakes.waiting import until

FAST = RestartPolicy(first_delay_s=0.02, longest_delay_s=0.1, reset_after_s=60, attempts=2)


class Service:
    """A supervisor that runs as a task of the test."""

    def __init__(self, directory: Path, behaviours: dict[str, str], **options: Any) -> None:
        self.directory = directory
        self.metrics = MetricStore()
        self.announced: list[EngineInfo] = []
        self.when_front_end_stopped: list[list[str]] = []
        specs = [self._spec(name, behaviour) for name, behaviour in behaviours.items()]
        values = {"restarts": FAST, "red_s": 0.3, "exit_margin_s": 5.0, **options}
        self.supervisor = Supervisor(
            specs,
            SupervisorOptions(**values),
            self.metrics,
            self.announced.append,
            lambda: self.when_front_end_stopped.append(self.notes("engine 0")),
        )
        self.exit_code: asyncio.Task[int] | None = None

    def _spec(self, name: str, behaviour: str) -> ChildSpec:
        role, index = name.split()
        control = str(self.directory / "control.sock")
        command = (
            sys.executable,
            "-m",
            "tests.fakes.child",
            control,
            role,
            index,
            str(self.notes_file(name)),
            behaviour,
        )
        return ChildSpec("engine" if role == "engine" else "api", int(index), command)

    def notes_file(self, name: str) -> Path:
        return self.directory / f"{name}.notes"

    def notes(self, name: str) -> list[str]:
        file = self.notes_file(name)
        return file.read_text().splitlines() if file.exists() else []

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[1]) for line in self.notes(name) if line.startswith("start")]

    def states(self, name: str) -> list[ServiceState]:
        lines = (line.removeprefix("state ") for line in self.notes(name) if line.startswith("state "))
        return [
            ServiceState(**{key: value for key, value in json.loads(line).items() if key != "type"}) for line in lines
        ]

    async def until_ready(self, engines: int = 1) -> None:
        await until(lambda: bool(self.states("api 0")) and self.states("api 0")[-1].engines_up == engines)

    async def ended(self) -> int:
        assert self.exit_code is not None
        return await asyncio.wait_for(asyncio.shield(self.exit_code), 20)


Start = Callable[..., Awaitable[Service]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts services, and ends what is left of them."""
    services: list[tuple[Service, Any]] = []

    @asynccontextmanager
    async def running(service: Service) -> AsyncIterator[None]:
        async with ControlServer(service.directory / "control.sock", service.supervisor):
            service.exit_code = asyncio.create_task(service.supervisor.run())
            yield
            if not service.exit_code.done():
                service.supervisor.signalled(signal.SIGTERM)
                service.supervisor.signalled(signal.SIGTERM)
                await asyncio.wait_for(service.exit_code, 10)

    async def start(behaviours: dict[str, str] | None = None, **options: Any) -> Service:
        service = Service(tmp_path, behaviours or {"engine 0": "serve", "api 0": "serve"}, **options)
        context = running(service)
        await context.__aenter__()
        services.append((service, context))
        return service

    yield start
    for service, context in services:
        await context.__aexit__(None, None, None)
        for name in ("engine 0", "engine 1", "api 0"):
            assert not any(runs(pid) for pid in service.pids(name)), "a child outlived the supervisor"


def runs(pid: int) -> bool:
    """Whether the process is there. One that exited, and that nobody has asked about yet, is not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


async def test_it_announces_once_when_all_are_ready(start: Start) -> None:
    service = await start({"engine 0": "serve", "engine 1": "serve", "api 0": "serve"})
    await service.until_ready(engines=2)
    await until(lambda: bool(service.announced))
    assert service.announced == [INFO]
    assert service.states("api 0")[-1] == ServiceState(healthy=True, engines_up=2, draining=False)
    assert service.metrics.value("engine_up", ("1",)) == 1
    assert service.metrics.value("engine_restarts_total", ("0",)) == 0
    assert service.metrics.value("preemptions_total", ("1",)) == 0


async def test_before_an_engine_is_ready_the_service_is_healthy_with_none_up(start: Start) -> None:
    service = await start({"engine 0": "never ready", "api 0": "serve"})
    await until(lambda: bool(service.states("api 0")))
    assert service.states("api 0")[-1] == ServiceState(
        healthy=True, engines_up=0, draining=False, detail="no engine is up"
    )
    assert service.metrics.value("engine_up", ("0",)) == 0
    assert not service.announced


async def test_a_killed_engine_is_started_again_and_no_counter_goes_back(start: Start) -> None:
    service = await start()
    await service.until_ready()
    await until(lambda: service.metrics.value("requests_running", ("0",)) == 3)
    os.kill(service.pids("engine 0")[0], signal.SIGKILL)
    await until(lambda: len(service.pids("engine 0")) == 2)
    await until(lambda: service.metrics.value("steps_total", ("0",)) == 2)
    await service.until_ready()
    assert service.metrics.value("engine_restarts_total", ("0",)) == 1
    assert service.metrics.value("requests_running", ("0",)) == 3
    states = service.states("api 0")
    assert all(state.healthy for state in states)
    assert [state.engines_up for state in states if state.engines_up == 0 or state is states[-1]][-2:] == [0, 1]
    assert len(service.announced) == 1


async def test_gauges_of_a_dead_engine_are_gone(start: Start) -> None:
    service = await start(restarts=RestartPolicy(first_delay_s=60, longest_delay_s=60))
    await service.until_ready()
    await until(lambda: service.metrics.value("requests_running", ("0",)) == 3)
    os.kill(service.pids("engine 0")[0], signal.SIGKILL)
    await until(lambda: service.metrics.value("requests_running", ("0",)) is None)
    assert service.metrics.value("engine_up", ("0",)) == 0
    assert service.metrics.value("steps_total", ("0",)) == 1


async def test_a_killed_api_process_is_started_again(start: Start) -> None:
    service = await start()
    await service.until_ready()
    os.kill(service.pids("api 0")[0], signal.SIGKILL)
    await until(lambda: len(service.pids("api 0")) == 2)
    await service.until_ready()
    assert len(service.pids("engine 0")) == 1


async def test_an_engine_that_keeps_dying_turns_the_service_red_and_ends_it(start: Start) -> None:
    service = await start({"engine 0": "die", "api 0": "serve"})
    assert await service.ended() == 1
    assert len(service.pids("engine 0")) == 1 + FAST.attempts
    last = service.states("api 0")[-1]
    assert not last.healthy
    assert "engine 0 exited with code 1, as after each of its last 2 restarts" in last.detail
    assert service.notes("api 0")[-1] == "shutdown 0"


async def test_a_crash_at_a_restart_is_tried_again_too(start: Start) -> None:
    service = await start({"engine 0": "crash unless first", "api 0": "serve"})
    assert await service.ended() == 1
    assert len(service.pids("engine 0")) == 1 + FAST.attempts


async def test_a_child_that_says_it_cannot_start_ends_the_service_at_once(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start({"engine 0": "fail", "api 0": "serve"})
    assert await service.ended() == 1
    assert len(service.pids("engine 0")) == 1
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["engine 0 cannot start: there is no such model"]
    assert not any("no such model" in state.detail for state in service.states("api 0"))
    assert not any(record.exc_info for record in caplog.records)


async def test_a_crash_before_it_ever_worked_ends_the_service(start: Start) -> None:
    service = await start({"engine 0": "crash", "api 0": "serve"})
    assert await service.ended() == 1
    assert len(service.pids("engine 0")) == 1


async def test_a_child_killed_before_it_ever_worked_is_started_again(start: Start) -> None:
    service = await start({"engine 0": "never ready", "api 0": "serve"})
    await until(lambda: len(service.pids("engine 0")) == 1)
    os.kill(service.pids("engine 0")[0], signal.SIGKILL)
    await until(lambda: len(service.pids("engine 0")) == 2)


async def test_a_command_that_is_not_there_ends_the_service(tmp_path: Path) -> None:
    spec = ChildSpec("engine", 0, (str(tmp_path / "missing"),))
    supervisor = Supervisor([spec], SupervisorOptions(), MetricStore(), lambda _: None)
    async with ControlServer(tmp_path / "control.sock", supervisor):
        assert await asyncio.wait_for(supervisor.run(), 10) == 1


async def test_a_signal_drains_the_front_end_first_then_the_engines(start: Start) -> None:
    service = await start({"engine 0": "serve", "api 0": "drain 0.3"}, drain_timeout_s=7.0)
    await service.until_ready()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: "shutdown 7" in service.notes("api 0"))
    assert service.states("api 0")[-1] == ServiceState(
        healthy=True, engines_up=1, draining=True, detail="the server is shutting down"
    )
    assert not any(line.startswith("shutdown") for line in service.notes("engine 0"))
    assert await service.ended() == 0
    assert "drained" in service.notes("api 0")
    assert "shutdown 0" in service.notes("engine 0")
    (engine_then,) = service.when_front_end_stopped
    assert "shutdown 0" not in engine_then


async def test_a_second_signal_stops_at_once(start: Start) -> None:
    service = await start({"engine 0": "serve", "api 0": "drain 60"}, drain_timeout_s=60.0)
    await service.until_ready()
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: "shutdown 60" in service.notes("api 0"))
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(service.ended(), 3) == 128 + signal.SIGINT


async def test_who_does_not_exit_in_time_is_killed(start: Start) -> None:
    service = await start(
        {"engine 0": "ignore shutdown", "api 0": "ignore shutdown"}, drain_timeout_s=0.1, exit_margin_s=0.2
    )
    await service.until_ready()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await service.ended() == 0


@pytest.mark.parametrize("behaviour", ["never connect", "never ready"])
async def test_a_signal_during_the_start_stops_without_waiting(start: Start, behaviour: str) -> None:
    service = await start({"engine 0": behaviour, "api 0": behaviour}, drain_timeout_s=60.0)
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(service.ended(), 3) == 0


@pytest.mark.parametrize(
    ("behaviour", "complaint"), [("hang", "a step has taken more than"), ("fall silent", "no sign of life")]
)
async def test_an_engine_that_hangs_turns_the_service_red_and_ends_it(
    start: Start, behaviour: str, complaint: str
) -> None:
    service = await start({"engine 0": behaviour, "api 0": "serve"}, step_timeout_s=0.4, exit_margin_s=0.5)
    assert await service.ended() == 1
    last = service.states("api 0")[-1]
    assert not last.healthy
    assert complaint in last.detail


async def test_a_busy_engine_is_not_taken_for_a_hung_one(start: Start) -> None:
    service = await start({"engine 0": "work", "api 0": "serve"}, step_timeout_s=1.0)
    await service.until_ready()
    await asyncio.sleep(2.0)
    assert service.states("api 0")[-1].healthy
    assert len(service.pids("engine 0")) == 1


async def test_a_child_that_breaks_the_protocol_loses_its_connection_and_is_replaced(start: Start) -> None:
    service = await start({"engine 0": "break the protocol", "api 0": "serve"})
    await until(lambda: len(service.pids("engine 0")) >= 2)
    assert len(service.pids("api 0")) == 1


@pytest.mark.parametrize(
    "words",
    [
        b"\xff\xff\xff\xffxxxx",
        b"\x00\x00\x00\x05hello",
        b"\x00\x00\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x0c\x81\xa4type\xa5Ready",
    ],
)
async def test_a_stranger_on_the_control_socket_is_turned_away_and_harms_nobody(start: Start, words: bytes) -> None:
    service = await start()
    await service.until_ready()
    reader, writer = await asyncio.open_unix_connection(str(service.directory / "control.sock"))
    writer.write(words)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert service.states("api 0")[-1].engines_up == 1
    assert len(service.pids("engine 0")) == 1


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from server.children import ChildSpec
from server.control_server import ControlServer
from server.metrics_registry import MetricStore
from server.supervisor import Supervisor, SupervisorOptions

async def main(control):
    command = (sys.executable, "-m", "tests.fakes.child")
    specs = [
        ChildSpec(role, 0, (*command, control, role, "0", f"{control}.{role}", "serve")) for role in ("engine", "api")
    ]
    supervisor = Supervisor(specs, SupervisorOptions(), MetricStore(), lambda _: print("ready", flush=True))
    async with ControlServer(Path(control), supervisor):
        await supervisor.run()

asyncio.run(main(sys.argv[1]))
"""


async def test_children_of_a_killed_supervisor_exit_within_two_seconds(tmp_path: Path) -> None:
    control = str(tmp_path / "control.sock")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, control, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"ready\n"
        pids = [int(Path(f"{control}.{role}").read_text().split()[1]) for role in ("engine", "api")]
        assert all(runs(pid) for pid in pids)
        process.kill()
        await process.wait()
        await until(lambda: not any(runs(pid) for pid in pids), timeout_s=2)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
