"""Answers the requests of a batch through engine processes of its own, as many at once as keep the engines busy."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from starlette.types import ASGIApp

from engine.client import EngineClient
from engine.metrics import MetricsRecorder
from engine.socket_client import SocketEngineClient
from engine.tokenizer import Tokenizer
from engine.types import EngineInfo
from server.app_state import AppState
from server.batch.ask import Answer, ask_until_answered, completion_app
from server.batch.lines import Line
from server.control_server import ControlServer
from server.metrics_registry import MetricStore
from server.service import control_socket, engine_sockets, plan_engines
from server.settings import ServeSettings
from server.supervisor import Supervisor, SupervisorOptions

LINES_A_ROW = 2
"""A row that becomes free finds a request waiting."""

Take = Callable[[Line, Answer], None]


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Counted(msgspec.Struct):
    """What is read of an answer."""

    usage: _Usage


class Engines(NamedTuple):
    """What runs the requests, as long as it does."""

    app: ASGIApp
    client: EngineClient
    rows: int


async def run_batch(
    settings: ServeSettings, model: Path, directory: Path, lines: Iterator[Line], left: int, take: Take
) -> int | None:
    """Start the engines, hand each answer to `take`, stop the engines. `directory` is for their sockets.

    Returns None when all `left` lines are answered, or the exit code with which the engines stopped before that: after
    a signal, or a failure that the log tells. Raises what `take` and `lines` raise.
    """
    metrics = MetricStore()
    ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
    supervisor = Supervisor(
        plan_engines(settings, model, directory),
        # Nobody asks for the health of a batch.
        SupervisorOptions(drain_timeout_s=0, step_timeout_s=settings.step_timeout, red_s=0),
        metrics,
        lambda info: None if ready.done() else ready.set_result(info),
    )
    recorder = MetricsRecorder(lambda increment: metrics.apply(increment, "batch"))
    client = SocketEngineClient(engine_sockets(settings, directory), recorder)

    async def render_metrics(openmetrics: bool) -> tuple[str, bytes]:
        recorder.flush()
        return metrics.render(openmetrics)

    state = AppState(
        engine=client,
        tokenizer=Tokenizer.load(model),
        settings=settings,
        metrics=recorder,
        render_metrics=render_metrics,
    )

    async def work() -> None:
        rows = (await ready).max_rows * len(settings.engine_devices())
        with show_progress(left) as progressed:

            def taken(line: Line, answer: Answer) -> None:
                take(line, answer)
                progressed(answer)

            await answer_all(Engines(completion_app(state), client, rows), lines, left, taken)

    async with ControlServer(control_socket(directory), supervisor):
        client.start()
        supervising = asyncio.create_task(supervisor.run())
        working = asyncio.create_task(work())
        try:
            await asyncio.wait((supervising, working), return_when=asyncio.FIRST_COMPLETED)
        finally:
            unfinished = working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await client.close()
            supervisor.stop()
            exit_code = await supervising
    if unfinished:
        return exit_code
    working.result()
    return None


async def answer_all(engines: Engines, lines: Iterator[Line], left: int, take: Take) -> None:
    """Answer `left` lines, so many at a time that no row stands empty. Raises what `take` or `lines` raise."""

    async def keep_asking() -> None:
        for line in lines:
            take(line, await ask_until_answered(engines.app, engines.client, bytes(line.request.body)))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(left, engines.rows * LINES_A_ROW)):
                group.create_task(keep_asking())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


@contextmanager
def show_progress(left: int) -> Iterator[Callable[[Answer], None]]:
    """A bar on standard error, if that is a terminal, to be told of each answer."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens  {task.fields[rate]:,.0f} tok/s"),
    )
    console = Console(stderr=True)
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    decoder = msgspec.json.Decoder(_Counted)
    with bars:
        task, tokens, start = bars.add_task("answering", total=left, tokens=0, rate=0), 0, time.monotonic()

        def progressed(answer: Answer) -> None:
            nonlocal tokens
            if answer.status == 200:
                tokens += decoder.decode(answer.body).usage.completion_tokens
            bars.update(task, advance=1, tokens=tokens, rate=tokens / (time.monotonic() - start))

        yield progressed
