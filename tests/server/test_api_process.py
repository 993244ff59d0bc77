"""The API process as a process: on an inherited socket, between a fake engine and a fake supervisor."""

import asyncio
import json
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.control import EXIT_ORPHANED
from engine.messages import (
    ChildFailed,
    ChildReady,
    MetricsIncrement,
    MetricsText,
    RenderMetrics,
    ServiceState,
    Shutdown,
    ToSupervisor,
)
from engine.metrics import MetricsRecorder
from engine.process_config import ApiProcessConfig, LogConfig, write_process_config
from server.api_process import flush_for_ever
from server.children import ChildProcess, ChildSpec, module_command
from server.control_server import ControlLink, ControlServer
from server.metrics_registry import MetricStore
from server.settings import ServeSettings
from server.sockets import bind_port, server_url
from tests.engine import tokenizers_of_tests
from tests.fakes.child import INFO
from tests.fakes.engine import FakeEngine
from tests.fakes.waiting import until


class FakeSupervisor:
    """Keeps the only link and the metrics."""

    def __init__(self) -> None:
        self.link: ControlLink | None = None
        self.heard: list[ToSupervisor] = []
        self.metrics = MetricStore()

    def connected(self, link: ControlLink) -> None:
        self.link = link
        self.announce()

    def received(self, link: ControlLink, message: ToSupervisor) -> None:
        self.heard.append(message)
        if isinstance(message, MetricsIncrement):
            self.metrics.apply(message, "api 0")
        elif isinstance(message, RenderMetrics):
            content_type, body = self.metrics.render(message.openmetrics)
            link.send(MetricsText(render_id=message.render_id, content_type=content_type, body=body))

    def disconnected(self, link: ControlLink) -> None:
        assert link is self.link

    def announce(self, healthy: bool = True, engines_up: int = 1, draining: bool = False) -> None:
        assert self.link is not None
        self.link.send(ServiceState(healthy=healthy, engines_up=engines_up, draining=draining, detail="as told"))

    def shut_down(self, deadline_s: float) -> None:
        assert self.link is not None
        self.announce(draining=True)
        self.link.send(Shutdown(deadline_s=deadline_s))


class Api:
    """A running API process and its surroundings."""

    def __init__(self, directory: Path, listener: socket.socket, engine: FakeEngine) -> None:
        self.directory = directory
        self.listener = listener
        self.engine = engine
        self.supervisor = FakeSupervisor()
        self.control = ControlServer(directory / "control.sock", self.supervisor)
        self.process: ChildProcess | None = None

    def start(self) -> ChildProcess:
        settings = ServeSettings(port=0, served_model_name=("m",))
        config = ApiProcessConfig(
            index=0,
            model=str(self.directory),
            listen_fd=self.listener.fileno(),
            engine_sockets=[str(self.directory / "engine0.sock")],
            control_path=str(self.directory / "control.sock"),
            settings=settings.model_dump_json(),
            log=LogConfig(level="error"),
        )
        path = self.directory / "api0.json"
        write_process_config(path, config)
        command = module_command("server.api_process", path)
        self.process = ChildProcess(ChildSpec("api", 0, command, pass_fds=(self.listener.fileno(),)))
        return self.process

    @asynccontextmanager
    async def running(self) -> AsyncIterator[httpx.AsyncClient]:
        """Start it; a client once it is connected to the engine."""
        self.start()
        await until(lambda: ChildReady() in self.supervisor.heard)
        async with httpx.AsyncClient(base_url=server_url(self.listener), timeout=20) as client:
            while (await client.get("/v1/models")).json()["data"][0]["max_model_len"] is None:
                await asyncio.sleep(0.01)
            yield client

    async def exited(self, timeout_s: float = 10) -> int:
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), timeout_s)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    tokenizers_of_tests.save(tokenizers_of_tests.byte_level(), tmp_path)
    with bind_port("127.0.0.1", 0) as listener:
        async with FakeEngine(tmp_path / "engine0.sock", INFO) as engine:
            made = Api(tmp_path, listener, engine)
            async with made.control:
                yield made
                if made.process is not None:
                    made.process.kill()
                    await made.exited()


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "the fox", "max_tokens": 5, **fields}


async def test_it_serves_completions_and_answers_probes_as_the_supervisor_says(api: Api) -> None:
    async with api.running() as client:
        answer = await client.post("/v1/completions", json=completion())
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert api.engine.submitted == 1
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        api.supervisor.announce(healthy=False, engines_up=0)
        while (health := await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        assert "as told" in health.json()["error"]["message"]
        assert (await client.get("/ready")).status_code == 503


async def test_it_may_have_as_many_connections_as_its_user_allows(api: Api) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What a child inherits.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        async with api.running():
            assert api.process is not None
            assert resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_metrics_include_all_that_was_answered_before(api: Api) -> None:
    async with api.running() as client:
        for expected in (5.0, 10.0, 15.0):
            await client.post("/v1/completions", json=completion())
            text = (await client.get("/metrics")).text
            assert f"blockserve_generation_tokens_total {expected}" in text


async def test_what_it_counts_is_sent_without_anybody_asking(api: Api) -> None:
    async with api.running() as client:
        await client.post("/v1/completions", json=completion())
        await until(lambda: api.supervisor.metrics.value("generation_tokens_total") == 5, timeout_s=2)
        assert not any(isinstance(message, RenderMetrics) for message in api.supervisor.heard)


async def test_a_drain_finishes_what_is_open_refuses_what_is_new_and_loses_no_count(api: Api) -> None:
    async with api.running() as client:
        api.engine.interval_s = 0.1
        async with client.stream("POST", "/v1/completions", json=completion(max_tokens=10, stream=True)) as response:
            lines = response.aiter_lines()
            await anext(lines)
            api.supervisor.shut_down(deadline_s=20)
            while (refused := await client.post("/v1/completions", json=completion())).status_code == 200:
                await asyncio.sleep(0.01)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert await api.exited(5) == 0
        counted = api.supervisor.metrics.value("requests_total", ("length",))
        assert counted == api.engine.submitted


async def test_at_the_deadline_of_a_drain_what_is_open_is_cut_off_and_told_so(api: Api) -> None:
    async with api.running() as client:
        api.engine.interval_s = 0.1
        async with client.stream("POST", "/v1/completions", json=completion(max_tokens=50, stream=True)) as response:
            lines = response.aiter_lines()
            await anext(lines)
            api.supervisor.shut_down(deadline_s=0.3)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "error" in json.loads(rest[-2].removeprefix("data: "))
        assert await api.exited(5) == 0
        assert api.supervisor.metrics.value("requests_total", ("error",)) == 1


async def test_an_idle_process_exits_at_once_though_connections_are_kept(api: Api) -> None:
    async with api.running():
        api.supervisor.shut_down(deadline_s=60)
        assert await api.exited(3) == 0


async def test_ctrl_c_and_sigterm_are_the_supervisors_to_answer(api: Api) -> None:
    async with api.running() as client:
        assert api.process is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(api.process.pid, number)
        await asyncio.sleep(0.2)
        assert (await client.post("/v1/completions", json=completion())).status_code == 200


async def test_without_its_supervisor_it_exits_within_two_seconds(api: Api) -> None:
    async with api.running() as client:
        api.engine.interval_s = 0.1
        task = asyncio.create_task(client.post("/v1/completions", json=completion(max_tokens=50)))
        await until(lambda: api.engine.submitted == 1)
        assert api.supervisor.link is not None
        api.supervisor.link.close()
        assert await api.exited(2) == EXIT_ORPHANED
        with pytest.raises(httpx.TransportError):
            await task


def _remove(path: Path) -> None:
    path.unlink()


def _break(path: Path) -> None:
    path.write_text("{")


@pytest.mark.parametrize("spoil", [_remove, _break])
async def test_without_a_tokenizer_it_says_why_it_cannot_start(api: Api, spoil: Callable[[Path], None]) -> None:
    spoil(api.directory / "tokenizer.json")
    api.start()
    assert await api.exited() == 1
    await until(lambda: bool(api.supervisor.heard))
    (failed,) = api.supervisor.heard
    assert isinstance(failed, ChildFailed)
    assert "tokenizer.json" in failed.message


async def test_a_busy_event_loop_is_seen_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api_process.FLUSH_S", 0.01)
    sent: list[MetricsIncrement] = []
    flushing = asyncio.create_task(flush_for_ever(MetricsRecorder(sent.append), 3))
    await until(lambda: len(sent) > 1)
    sent.clear()
    # As work that does not give way.
    time.sleep(0.4)
    await until(lambda: bool(sent))
    flushing.cancel()
    ((name, labels, _counts, lag),) = sent[0].histograms
    assert (name, labels) == ("event_loop_lag_seconds", ("3",))
    assert 0.3 < lag < 4
