"""The API process's end of the control connection, against the supervisor's end."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.messages import (
    ChildHello,
    ChildReady,
    MetricsIncrement,
    MetricsText,
    RenderMetrics,
    ServiceState,
    Shutdown,
    ToSupervisor,
)
from server import control
from server.control import SupervisorLink
from server.control_server import ControlLink, ControlServer
from tests.fakes.waiting import until

STATE = ServiceState(healthy=True, engines_up=1, draining=False)


class Recorder:
    """A supervisor that keeps what it hears, and renders the number of what it heard."""

    def __init__(self) -> None:
        self.links: list[ControlLink] = []
        self.heard: list[ToSupervisor] = []
        self.gone = 0
        self.answers = True

    def connected(self, link: ControlLink) -> None:
        self.links.append(link)
        link.send(STATE)

    def received(self, link: ControlLink, message: ToSupervisor) -> None:
        self.heard.append(message)
        if isinstance(message, RenderMetrics) and self.answers:
            body = f"{len(self.heard)} {message.openmetrics}".encode()
            link.send(MetricsText(render_id=message.render_id, content_type="text/x", body=body))

    def disconnected(self, link: ControlLink) -> None:
        assert link in self.links
        self.gone += 1


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Recorder]:
    recorder = Recorder()
    async with ControlServer(tmp_path / "control.sock", recorder):
        yield recorder


async def connect(path: Path, on_end: asyncio.Event | None = None) -> SupervisorLink:
    ended = on_end or asyncio.Event()
    return await SupervisorLink.connect(path / "control.sock", 0, on_end=ended.set)


async def test_it_says_hello_and_what_it_sends_arrives_even_just_before_it_closes(
    supervisor: Recorder, tmp_path: Path
) -> None:
    link = await connect(tmp_path)
    sent: list[ToSupervisor] = [ChildReady(), *(MetricsIncrement(counters=[("x", (), float(i))]) for i in range(100))]
    for message in sent:
        link.send(message)
    await link.close()
    await until(lambda: supervisor.gone == 1)
    assert supervisor.links[0].hello == ChildHello(role="api", index=0, pid=os.getpid())
    assert supervisor.heard == sent


async def test_it_keeps_the_state_and_tells_who_asked(supervisor: Recorder, tmp_path: Path) -> None:
    link = await connect(tmp_path)
    assert link.state.healthy
    told: list[ServiceState] = []
    link.on_state = told.append
    await until(lambda: told == [STATE])
    assert link.state == STATE
    await link.close()


async def test_metrics_are_rendered_by_the_supervisor_each_to_who_asked(supervisor: Recorder, tmp_path: Path) -> None:
    link = await connect(tmp_path)
    link.send(ChildReady())
    answers = await asyncio.gather(*(link.render_metrics(openmetrics=i % 2 == 1) for i in range(4)))
    assert answers == [("text/x", f"{i + 2} {i % 2 == 1}".encode()) for i in range(4)]
    await link.close()


async def test_a_supervisor_that_does_not_answer_is_a_timeout(
    supervisor: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RENDER_TIMEOUT_S", 0.05)
    supervisor.answers = False
    link = await connect(tmp_path)
    with pytest.raises(TimeoutError):
        await link.render_metrics(openmetrics=False)
    await link.close()


async def test_shutdown_brings_its_deadline_once(supervisor: Recorder, tmp_path: Path) -> None:
    link = await connect(tmp_path)
    await until(lambda: bool(supervisor.links))
    supervisor.links[0].send(Shutdown(deadline_s=3.5))
    supervisor.links[0].send(Shutdown(deadline_s=9.0))
    assert await asyncio.wait_for(link.shutdown, 5) == 3.5
    await link.close()


async def test_the_end_of_the_connection_is_the_end_of_the_process(supervisor: Recorder, tmp_path: Path) -> None:
    ended = asyncio.Event()
    link = await connect(tmp_path, ended)
    await until(lambda: bool(supervisor.links))
    supervisor.links[0].close()
    await asyncio.wait_for(ended.wait(), 5)
    await link.close()


async def test_closing_is_not_such_an_end(supervisor: Recorder, tmp_path: Path) -> None:
    ended = asyncio.Event()
    link = await connect(tmp_path, ended)
    await link.close()
    await until(lambda: supervisor.gone == len(supervisor.links) == 1)
    assert not ended.is_set()


async def test_nobody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await connect(tmp_path)
