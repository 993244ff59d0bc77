"""Measures the front end alone: real API processes under the real supervisor, before an engine that computes nothing.

    python -m benchmarks.front_end [--open 1 64 1024] [--clients 2] [--api-processes 1] [--seconds 5]

Prints tokens a second, and what a thousand deltas (a step's block for one request) and a request cost the API processes
in CPU time, whole and streamed. Appends the rows to benchmarks/results/front_end.jsonl and ends with one JSON line.
Clients and the canned engine take cores too: where there are few, tokens a second are those of all together, and the
CPU time is the figure to compare.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import append, provenance
from engine.config import ModelConfig
from engine.logs import configure_logging
from engine.model_files import find_model
from server.bench.figures import figures
from server.bench.http_client import Address
from server.bench.messages import Begin, Lengths, Work
from server.bench.workers import start_workers
from server.children import ChildSpec, module_command
from server.control_server import ControlServer
from server.metrics_registry import MetricStore
from server.runtime_directory import runtime_directory
from server.service import control_socket, plan_children
from server.settings import ServeSettings
from server.sockets import bind_ports
from server.supervisor import Supervisor, SupervisorOptions

PROMPT_TOKENS = 128
ANSWER_TOKENS = (128, 384)
"""The shortest and the longest answer. A request's own cost is measured with answers of a block."""
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Service:
    """A front end that is ready."""

    host: str
    port: int
    vocab_size: int
    block_length: int


@asynccontextmanager
async def canned_service(settings: ServeSettings) -> AsyncIterator[Service]:
    """The service of `settings`, with `benchmarks.canned_engine` in place of its engine, supervised by this process."""
    model = find_model(settings.model)
    config = ModelConfig.load(model)
    with bind_ports(settings.host, 0, settings.front_ends()) as listeners, runtime_directory() as directory:
        specs = [_canned(spec) for spec in plan_children(settings, model, listeners, directory)]
        ready = asyncio.Event()
        supervisor = Supervisor(specs, SupervisorOptions(), MetricStore(), lambda _: ready.set())
        async with ControlServer(control_socket(directory), supervisor):
            running = asyncio.create_task(supervisor.run())
            try:
                await asyncio.wait_for(ready.wait(), 60)
                await asyncio.sleep(0.5)  # for the connections between them
                host, port = listeners[0].getsockname()[:2]
                yield Service(host, port, config.vocab_size, config.block_length)
            finally:
                supervisor.signalled(signal.SIGTERM)
                await running


def _canned(spec: ChildSpec) -> ChildSpec:
    if spec.role != "engine":
        return spec
    return dataclasses.replace(spec, command=module_command("benchmarks.canned_engine", Path(spec.command[-1])))


def cpu_seconds(module: str) -> float:
    """CPU time that this process's children that run `module` have taken."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and module in (path / "cmdline").read_text().split("\0"):
                total += int(fields[11]) + int(fields[12])
        except OSError:
            continue  # it has just ended
    return total / CLOCK_TICKS


def _works(
    service: Service, clients: int, open_requests: int, *, streamed: bool, tokens: tuple[int, int]
) -> list[Work]:
    return [
        Work(
            address=Address(service.host, service.port),
            headers={},
            model=None,
            streamed=streamed,
            ignore_eos=True,
            temperature=0.0,
            prompts=[],
            prompt_lengths=Lengths(kind="fixed", mean=PROMPT_TOKENS),
            output_lengths=Lengths(kind="uniform", low=tokens[0], high=tokens[1]),
            vocab_size=service.vocab_size,
            words=False,
            concurrency=open_requests // clients + (number < open_requests % clients),
            rate=0.0,
            requests=None,
            timeout_s=600.0,
            seed=number,
        )
        for number in range(clients)
    ]


async def measure(
    service: Service, arguments: argparse.Namespace, open_requests: int, *, streamed: bool, tokens: tuple[int, int]
) -> dict[str, Any]:
    """Keep so many requests open, spread over the client processes, and count."""
    taken: dict[str, float] = {}

    async def watch_cpu(begin: Begin) -> None:
        await asyncio.sleep(begin.measure_from - time.monotonic())
        before = {name: cpu_seconds(name) for name in ("server.api_process", "benchmarks.canned_engine")}
        await asyncio.sleep(begin.end - time.monotonic())
        taken.update({name: cpu_seconds(name) - then for name, then in before.items()})

    watching: list[asyncio.Task[None]] = []
    clients = min(arguments.clients, open_requests)
    async with start_workers(_works(service, clients, open_requests, streamed=streamed, tokens=tokens)) as workers:
        begin, records = await workers.run(
            arguments.seconds,
            arguments.warm_up,
            on_begin=lambda begin: watching.append(asyncio.create_task(watch_cpu(begin))),
        )
        await asyncio.gather(*watching)
    found = figures(records, start=begin.measure_from, end=begin.end, service_level=None)
    answers = found["answers"]
    if not answers or found["failures"]:
        raise RuntimeError(f"{answers} answers, failures: {found['errors']}")
    return {
        "streamed": streamed,
        "open_requests": open_requests,
        "answers": answers,
        "tok_s": found["tok_s"],
        "answers_s": round(answers / arguments.seconds, 1),
        "api_cores": round(taken["server.api_process"] / arguments.seconds, 3),
        "engine_cores": round(taken["benchmarks.canned_engine"] / arguments.seconds, 3),
        "api_cpu_ms_per_answer": round(1e3 * taken["server.api_process"] / answers, 4),
        "tokens_per_answer": round(found["tokens"] / answers, 1),
    }


async def measure_both(
    service: Service, arguments: argparse.Namespace, open_requests: int, *, streamed: bool
) -> dict[str, Any]:
    """Long answers, and answers of one delta: the difference is what deltas cost."""
    length = service.block_length
    longer = await measure(service, arguments, open_requests, streamed=streamed, tokens=ANSWER_TOKENS)
    single = await measure(service, arguments, open_requests, streamed=streamed, tokens=(length, length))
    deltas = longer["tokens_per_answer"] / length - 1
    difference = longer["api_cpu_ms_per_answer"] - single["api_cpu_ms_per_answer"]
    return {
        **longer,
        "cpu_s_per_1000_deltas": round(difference / deltas, 4),
        "cpu_ms_per_request": single["api_cpu_ms_per_answer"],
        "single_delta_answers_s": single["answers_s"],
    }


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    common = {
        "bench": "front_end",
        "model": "default",
        "device": "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        **provenance(),
    }
    settings = ServeSettings(port=0, log_level="warning", max_waiting=1 << 20, api_processes=arguments.api_processes)
    async with canned_service(settings) as service:
        for streamed in (False, True):
            for open_requests in arguments.open:
                figures = await measure_both(service, arguments, open_requests, streamed=streamed)
                rows.append({**common, "api_processes": settings.front_ends(), **figures})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    title = f"front end on {rows[0]['cores']} cores, shared by clients and canned engine, commit {rows[0]['commit']}"
    table = Table(title=title)
    columns = {
        "API processes": "api_processes",
        "open": "open_requests",
        "tok/s": "tok_s",
        "API cores": "api_cores",
        "engine cores": "engine_cores",
        "CPU s / 1000 deltas": "cpu_s_per_1000_deltas",
        "CPU ms / request": "cpu_ms_per_request",
        "requests/s of a delta": "single_delta_answers_s",
    }
    table.add_column("answers")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row("streamed" if row["streamed"] else "whole", *(str(row[key]) for key in columns.values()))
    Console(width=140).print(table)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", type=int, nargs="+", default=[1, 64, 1024], help="requests kept open")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--api-processes", type=int, default=1, help="processes of the front end")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before each measurement")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    arguments = parser.parse_args()
    configure_logging(ServeSettings(log_level="warning").log_config(), "supervisor")
    rows = asyncio.run(run(arguments))
    show(rows)
    if not arguments.no_results:
        append("front_end", rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
