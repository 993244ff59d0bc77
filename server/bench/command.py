"""`blockserve bench`: measures a server load after load, and shows what came of it."""

import argparse
import asyncio
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from server.bench.figures import figures
from server.bench.http_client import Address, get
from server.bench.options import Load, OptionError, Plan, read_options
from server.bench.report import append_json, plot, show_table, watch
from server.bench.workers import WorkerError, module_process, start_workers
from server.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, complain
from server.version import version_info

COMMAND = "blockserve bench"
CLIENT_BOUND = 0.7
"""Share of the client's own ceiling from which on a figure is the client's as much as the server's."""


class BenchError(Exception):
    """The server cannot be measured. The message says why."""


class ModelEntry(msgspec.Struct):
    """One of /v1/models."""

    id: str


class ModelList(msgspec.Struct):
    """The answer of /v1/models."""

    data: list[ModelEntry]


def run_bench(options: argparse.Namespace) -> int:
    """Measure, show, keep; returns the exit code: 1 if nothing was answered, 2 for flags that do not fit."""
    try:
        plan = read_options(options)
        if plan.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise OptionError("--plot needs matplotlib: pip install matplotlib")
        if plan.plot is not None and plan.plot.suffix not in (".png", ".svg", ".pdf"):
            raise OptionError(f"--plot: {plan.plot} does not end in .png, .svg or .pdf")
        rows = asyncio.run(measure_all(plan))
        show_table(rows)
        if plan.json is not None:
            append_json(plan.json, rows)
        if plan.plot is not None:
            plot(plan.plot, rows)
    except OptionError as error:
        return complain(COMMAND, str(error), EXIT_BAD_INPUT)
    except (BenchError, WorkerError) as error:
        return complain(COMMAND, str(error), EXIT_FAILED)
    except OSError as error:
        return complain(COMMAND, f"{error.filename}: {error.strerror}", EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0 if all(row["answers"] for row in rows) else EXIT_FAILED


async def measure_all(plan: Plan) -> list[dict[str, Any]]:
    """A row of figures for each load. Raises BenchError and WorkerError."""
    if not plan.ceiling and plan.model is None:
        plan = plan._replace(model=await first_model(plan))
    rows = []
    for load in plan.loads:
        ceiling = None
        if plan.ceiling or plan.with_ceiling:
            async with canned_servers(_processes(plan, load)) as addresses:
                # A rate says nothing of what the client could do.
                ceiling_load = load if load.concurrency else Load(concurrency=256)
                ceiling = await measure(plan, ceiling_load, addresses, f"{load.name}, ceiling")
        if plan.ceiling:
            assert ceiling is not None
            rows.append({**_about(plan, load), "url": "canned", **ceiling})
            continue
        row = {**_about(plan, load), **await measure(plan, load, [plan.address], load.name)}
        if ceiling is not None:
            row["ceiling_tok_s"] = ceiling["tok_s"]
            row["client_bound"] = row["tok_s"] >= CLIENT_BOUND * ceiling["tok_s"]
        rows.append(row)
    return rows


async def measure(plan: Plan, load: Load, addresses: list[Address], title: str) -> dict[str, Any]:
    """One load on the servers at `addresses`, each asked by workers of its own."""
    async with start_workers(plan.works(load, addresses)) as workers:
        with watch(title, plan.warm_up, plan.seconds, plan.requests) as progress:
            begin, records = await workers.run(
                plan.seconds,
                plan.warm_up,
                on_begin=lambda begin: progress.begin(begin.start),
                on_progress=progress.update,
            )
    end = None if plan.seconds is None else begin.end
    row = figures(records, start=begin.measure_from, end=end, service_level=plan.service_level)
    # Unix seconds, for whoever looks at the server's own figures of the same time.
    measured_from = round(time.time() - time.monotonic() + begin.measure_from, 3)
    return {"workers": len(records), "measured_from": measured_from, **row}


async def first_model(plan: Plan) -> str:
    """The model that the server names first. Raises BenchError."""
    try:
        response = await asyncio.wait_for(get(plan.address, "/v1/models", plan.headers), 30)
    except (OSError, TimeoutError) as error:
        raise BenchError(f"{plan.url} does not answer: {str(error) or 'no answer in 30 s'}") from None
    if response.status != 200:
        hint = ": it wants an API key (--api-key)" if response.status == 401 else ""
        raise BenchError(f"{plan.url} answers /v1/models with status {response.status}{hint}")
    try:
        return msgspec.json.decode(response.body, type=ModelList).data[0].id
    except (msgspec.DecodeError, IndexError):
        raise BenchError(f"{plan.url} names no model at /v1/models: give --model") from None


@contextlib.asynccontextmanager
async def canned_servers(number: int, pace: float = 0.0) -> AsyncIterator[list[Address]]:
    """Servers that compute nothing, in processes of their own, with `pace` seconds a block. Raises WorkerError."""
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for _ in range(number):
            process = await stack.enter_async_context(module_process("server.bench.canned_server", str(pace)))
            assert process.stdout is not None
            line = await process.stdout.readline()
            if not line:
                raise WorkerError("the canned server did not start")
            addresses.append(Address("127.0.0.1", int(line)))
        yield addresses


def _about(plan: Plan, load: Load) -> dict[str, Any]:
    row: dict[str, Any] = {
        "bench": "blockserve bench",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version_info().version,
        "url": plan.url,
        "model": plan.model,
        "load": load.name,
        **({"concurrency": load.concurrency} if load.concurrency else {"rate": load.rate}),
        "streamed": plan.streamed,
        "prompt_lengths": plan.lengths_shown[0],
        "output_lengths": plan.lengths_shown[1],
        "seed": plan.seed,
    }
    return row if plan.service_level is None else {**row, "slo": plan.service_level_shown}


def _processes(plan: Plan, load: Load) -> int:
    return len(plan.works(load if load.concurrency else Load(concurrency=256), [plan.address]))
