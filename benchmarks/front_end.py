"""Measures the front end alone: real API processes under the real supervisor, before an engine that computes nothing.

    python -m benchmarks.front_end [--open 1 64 1024] [--clients 2] [--seconds 5]

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
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.load import Load, Loaded
from benchmarks.results import append, provenance
from engine.config import ModelConfig
from engine.logs import configure_logging
from engine.model_files import find_model
from server.children import ChildSpec, module_command
from server.control_server import ControlServer
from server.metrics_registry import MetricStore
from server.runtime_directory import runtime_directory
from server.service import control_socket, plan_children
from server.settings import ServeSettings
from server.sockets import bind_port
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
    with bind_port(settings.host, 0) as listener, runtime_directory() as directory:
        specs = [_canned(spec) for spec in plan_children(settings, model, listener, directory)]
        ready = asyncio.Event()
        supervisor = Supervisor(specs, SupervisorOptions(), MetricStore(), lambda _: ready.set())
        async with ControlServer(control_socket(directory), supervisor):
            running = asyncio.create_task(supervisor.run())
            try:
                await asyncio.wait_for(ready.wait(), 60)
                await asyncio.sleep(0.5)  # for the connections between them
                host, port = listener.getsockname()[:2]
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


async def _client(load: Load) -> Loaded:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load", msgspec.json.encode(load).decode(), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return msgspec.json.decode(output, type=Loaded)


async def measure(
    service: Service, arguments: argparse.Namespace, open_requests: int, *, streamed: bool, tokens: tuple[int, int]
) -> dict[str, Any]:
    """Keep so many requests open, spread over the client processes, and count."""
    clients = min(arguments.clients, open_requests)
    rng = random.Random(open_requests)
    begin = time.monotonic() + arguments.warm_up
    shares = [open_requests // clients + (number < open_requests % clients) for number in range(clients)]
    loads = [
        Load(
            host=service.host,
            port=service.port,
            open_requests=share,
            prompt=[rng.randrange(1, service.vocab_size) for _ in range(PROMPT_TOKENS)],
            streamed=streamed,
            fewest_tokens=tokens[0],
            most_tokens=tokens[1],
            begin=begin,
            end=begin + arguments.seconds,
            seed=number,
        )
        for number, share in enumerate(shares)
    ]
    loading = asyncio.gather(*(_client(load) for load in loads))
    await asyncio.sleep(begin - time.monotonic())
    before = {name: cpu_seconds(name) for name in ("server.api_process", "benchmarks.canned_engine")}
    await asyncio.sleep(begin + arguments.seconds - time.monotonic())
    taken = {name: cpu_seconds(name) - then for name, then in before.items()}
    loaded = await loading
    answers = sum(one.answers for one in loaded)
    if not answers or any(one.failures for one in loaded):
        raise RuntimeError(f"{answers} answers, {sum(one.failures for one in loaded)} failures")
    generated = sum(one.tokens for one in loaded)
    return {
        "streamed": streamed,
        "open_requests": open_requests,
        "answers": answers,
        "tok_s": round(generated / arguments.seconds, 1),
        "answers_s": round(answers / arguments.seconds, 1),
        "api_cores": round(taken["server.api_process"] / arguments.seconds, 3),
        "engine_cores": round(taken["benchmarks.canned_engine"] / arguments.seconds, 3),
        "api_cpu_ms_per_answer": round(1e3 * taken["server.api_process"] / answers, 4),
        "tokens_per_answer": round(generated / answers, 1),
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
    settings = ServeSettings(port=0, log_level="warning", max_waiting=1 << 20)
    async with canned_service(settings) as service:
        for streamed in (False, True):
            for open_requests in arguments.open:
                figures = await measure_both(service, arguments, open_requests, streamed=streamed)
                rows.append({**common, "api_processes": 1, **figures})
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
