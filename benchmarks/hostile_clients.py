"""Measures what clients that misbehave cost the others, and what they leave behind.

    python -m benchmarks.hostile_clients [--model DIR] [--device cuda] [--open 16] [--runs 5] [--seconds 8]
        [--server-arguments --max-rows 1024]

Starts `blockserve serve` and measures ordinary streams, alone and beside each kind of hostile client, in turn and
several times; the medians are compared. The kinds: a reader of one byte a second, connections that say nothing, clients
that vanish before and within their request's body, queued, and in the middle of their stream. Then everybody leaves:
rows, pages and descriptors have to be what they were, and the server has to stop at once, which it does not while a
request is still being worked on. Appends the rows to benchmarks/results/hostile_clients.jsonl, ends with one JSON line,
and exits with 1 if anything is left behind. On few cores the clients themselves take what the server would need.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.results import append, provenance
from benchmarks.server import Served, served
from server.bench.command import first_model, measure
from server.bench.http_client import Address, post
from server.bench.options import Load, Plan, add_arguments, read_options

STAGES = ("before the body", "within the body", "queued", "mid-stream")
KINDS = ("slow reader", "idle", "vanishing")
FIGURES = ("ttft_ms", "itl_ms", "e2e_ms")
GAUGES = ("requests_running", "requests_waiting", "kv_pages_used")
VANISH_S = 0.25
"""Between two clients that vanish at the same stage. Each is also work, which is not what is to be measured."""
RESERVED_DESCRIPTORS = 256
SETTLE_S = 10.0
"""What the server gets to tidy up in."""


def request(address: Address, vocab_size: int, max_length: int) -> bytes:
    """A stream that is as long as the model can make it."""
    prompt = [1 + place % (vocab_size - 1) for place in range(32)]
    fields = {"prompt": prompt, "max_tokens": max_length - 64, "ignore_eos": True, "stream": True}
    return post(address.head("POST", "/v1/completions", {}), json.dumps(fields).encode())


async def read_slowly(address: Address, data: bytes) -> None:
    """One byte a second, for ever; another stream where the server ends one."""
    loop = asyncio.get_running_loop()
    while True:
        with socket.socket() as stream:
            stream.setblocking(False)
            # What the kernel takes for the client is not unread.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):
                await loop.sock_connect(stream, (address.host, address.port))
                await loop.sock_sendall(stream, data)
                while await loop.sock_recv(stream, 1):  # noqa: ASYNC110 - a slow reader sleeps, whatever comes
                    await asyncio.sleep(1)


async def vanish(address: Address, data: bytes, stage: str) -> None:
    """Client after client that leaves at a stage."""
    head = data.index(b"\r\n\r\n") + 4
    sent = {"before the body": head, "within the body": (head + len(data)) // 2}.get(stage, len(data))
    while True:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(data[:sent])
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await writer.drain()
            if stage == "mid-stream":
                await reader.readuntil(b"data: ")
            writer.transport.abort()
            await writer.wait_closed()
        await asyncio.sleep(VANISH_S)


@contextlib.asynccontextmanager
async def silent(address: Address, number: int) -> AsyncIterator[None]:
    """So many connections that say nothing."""
    writers = []
    try:
        for _ in range(number):
            _, writer = await asyncio.open_connection(address.host, address.port)
            writers.append(writer)
        yield
    finally:
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


@contextlib.asynccontextmanager
async def beside(kinds: tuple[str, ...], address: Address, data: bytes, idle: int) -> AsyncIterator[None]:
    """Hostile clients of these kinds. Raises what one of them could not help."""
    work: list[Coroutine[None, None, None]] = []
    if "slow reader" in kinds:
        work.append(read_slowly(address, data))
    if "vanishing" in kinds:
        work += [vanish(address, data, stage) for stage in STAGES]
    async with silent(address, idle if "idle" in kinds else 0):
        tasks = [asyncio.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if error is not None and not isinstance(error, asyncio.CancelledError):
                raise error


def descriptors(supervisor: int) -> int:
    """Open descriptors of the server's processes, all together."""
    total = len(os.listdir(f"/proc/{supervisor}/fd"))
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == supervisor:
                total += len(os.listdir(path / "fd"))
    return total


def held(server: Served) -> dict[str, int]:
    """What requests hold: by the engines' gauges, /load, and open descriptors."""
    load, samples = httpx.get(f"{server.url}/load", timeout=30).json(), server.samples()
    gauges = {name: int(sum(s.value for s in samples if s.name == f"blockserve_{name}")) for name in GAUGES}
    return {**gauges, "load": load["running"] + load["waiting"], "descriptors": descriptors(server.pid)}


def left_behind(server: Served, before: dict[str, int]) -> dict[str, int]:
    """What more is held than before, once the server had time to tidy up."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        more = {name: number - before[name] for name, number in held(server).items() if number > before[name]}
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.1)


def scenarios(kinds: list[str]) -> list[tuple[str, ...]]:
    """What is measured: nobody else, each kind, all of them."""
    each = [(kind,) for kind in kinds]
    return [(), *each, *([tuple(kinds)] if len(kinds) > 1 else [])]


def change(before: float, now: float) -> float:
    """How much more it is, as a share."""
    return round(now / max(before, 1e-9) - 1, 4)


async def measure_all(server: Served, plan: Plan, options: argparse.Namespace, idle: int) -> list[dict[str, Any]]:
    """A row for each scenario, with the medians of all runs."""
    data = request(plan.address, server.config.vocab_size, server.config.max_length)
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {kinds: [] for kinds in scenarios(options.kinds)}
    load = Load(concurrency=options.open)
    for run in range(options.runs):
        for kinds, rows in found.items():
            async with beside(kinds, plan.address, data, idle):
                rows.append(await measure(plan, load, [plan.address], f"{run + 1} {' + '.join(kinds) or 'alone'}"))
    medians = {
        kinds: {
            f"p99_{name}": round(statistics.median((row[name] or {}).get("p99", 0.0) for row in rows), 3)
            for name in FIGURES
        }
        for kinds, rows in found.items()
    }
    return [
        {
            "beside": " + ".join(kinds) or "alone",
            **medians[kinds],
            **{f"{name}_change": change(medians[()][name], now) for name, now in medians[kinds].items()},
            "tok_s": round(statistics.median(row["tok_s"] for row in rows), 1),
            "failures": sum(row["failures"] for row in rows),
        }
        for kinds, rows in found.items()
    ]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start, measure, look what is left, stop."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    idle = min(options.idle, most - RESERVED_DESCRIPTORS)
    bench = argparse.ArgumentParser()
    add_arguments(bench)
    with served(options.model, options.device, options.server_arguments) as server:
        flags = ["--url", server.url, "--seconds", str(options.seconds)]
        flags += ["--warm-up", str(options.warm_up), "--workers", str(options.workers)]
        flags += ["--prompt-tokens", options.prompt_tokens, "--output-tokens", options.output_tokens]
        plan = read_options(bench.parse_args(flags))
        plan = plan._replace(model=asyncio.run(first_model(plan)))
        before = held(server)
        rows = asyncio.run(measure_all(server, plan, options, idle))
        left = left_behind(server, before)
        stopping = time.monotonic()
    left_about = {"left_behind": left, "stop_s": round(time.monotonic() - stopping, 2)}
    about = {"bench": "hostile_clients", "device": options.device, "open_requests": options.open, "runs": options.runs}
    return [{**about, "idle_connections": idle, **row, **left_about, **provenance()} for row in rows]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"{rows[0]['open_requests']} streams, medians of {rows[0]['runs']}, commit {rows[0]['commit']}")
    table.add_column("beside")
    for name in FIGURES:
        table.add_column(f"p99 {name.removesuffix('_ms')}, ms", justify="right")
    for column in ("tok/s", "failures"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row[f'p99_{name}']:.2f} ({row[f'p99_{name}_change']:+.1%})" for name in FIGURES)
        table.add_row(row["beside"], *figures, str(row["tok_s"]), str(row["failures"]))
    Console(width=120).print(table)
    print(f"left behind: {rows[0]['left_behind'] or 'nothing'}; stopped in {rows[0]['stop_s']} s")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: of this process)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory [the embedded model]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--open", type=int, default=16, help="ordinary streams kept open")
    parser.add_argument("--idle", type=int, default=2000, help="connections that say nothing")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before each")
    parser.add_argument("--prompt-tokens", default="64", help="as for `blockserve bench`")
    parser.add_argument("--output-tokens", default="64-192", help="as for `blockserve bench`")
    parser.add_argument("--workers", type=int, default=1, help="client processes of the ordinary streams")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--server-arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to the server")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    rows = run(options)
    show(rows)
    if not options.no_results:
        append("hostile_clients", rows)
    print(json.dumps({"rows": rows}))
    # A drain that waited for a request would have taken all of its time.
    if rows[0]["left_behind"] or rows[0]["stop_s"] > SETTLE_S:
        sys.exit(1)


if __name__ == "__main__":
    main()
