"""Measures the engine core alone, without processes and HTTP: generated tokens a second of whole batches.

    python -m benchmarks.engine [--models block-1.2B ...] [--workloads P D X] [--quick] [--sync] [--no-graphs]
    python -m benchmarks.engine --sampling top        temperature 0.8, top-k 50 and top-p 0.9 instead of greedy
    python -m benchmarks.engine --floor               measure the floors on this device, whatever it is
    python -m benchmarks.engine --profile [prefill]   where the time of steps goes

Random weights, random prompts, EOS ignored. All requests are submitted at once to the real scheduler, after graphs are
captured and kernels compiled; tok/s is generated tokens over the whole wall time, prefill included. A run under 30 s
is repeated, and the median of three kept. Prints a table with the floors, and the ratio of each pair of a block and a
vanilla model in the run; appends a row for each cell to benchmarks/results/engine.jsonl and ends with one JSON line.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.anchors import pairs_table, vllm_row
from benchmarks.floor import DeviceFloor
from benchmarks.harness import (
    Run,
    add_engine_arguments,
    describe,
    engine_config,
    free_device,
    loaded_core,
    make_requests,
    run_requests,
    warm_up,
)
from benchmarks.models import MODELS, WORKLOADS, BenchmarkModel, Workload
from benchmarks.profile import (
    KINDS,
    PROFILE_STEP_POSITIONS,
    decode_workload,
    prefill_number,
    prefill_workload,
    profile_steps,
)
from benchmarks.results import append, provenance
from engine.config import EngineConfig
from engine.core import EngineCore

BATCHES = {"P": 2, "D": 2, "X": 2}
"""Default number of requests, in full batches."""
REPEATED_UNDER_SECONDS = 30.0
REPEATS = 3


def measure_cell(
    core: EngineCore, model: BenchmarkModel, workload: Workload, requests: int, repeats: int, sampling: str
) -> Run:
    """The timed run, or the median of `repeats` where one takes under REPEATED_UNDER_SECONDS."""
    runs: list[Run] = []
    for seed in range(1, repeats + 1):
        runs.append(run_requests(core, make_requests(workload, requests, model.config.vocab_size, seed, sampling)))
        if runs[-1].seconds > REPEATED_UNDER_SECONDS:
            return runs[-1]
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def result_row(
    core: EngineCore,
    config: EngineConfig,
    model: BenchmarkModel,
    workload: Workload,
    requests: int,
    run: Run,
    sampling: str,
    measured: DeviceFloor | None,
) -> dict[str, Any]:
    """One line of the results. The floor is the one `measured` here, or else the one known for this very device."""
    floor: float | None = model.floor(workload.name, rows=config.max_rows, dtype=config.dtype, device=core.info.device)
    if measured is not None:
        floor = measured.tokens_per_second(workload)
    return {
        "bench": "engine",
        **describe(core, config),
        "workload": workload.name,
        "sampling": sampling,
        "requests": requests,
        "rows": run.rows,
        "tok_s": run.tokens / run.seconds,
        "floor_tok_s": None if floor is None else round(floor),
        "floor_measured_here": measured is not None,
        "vllm_tok_s": vllm_row(model.name, workload.name),
        "seconds": run.seconds,
        "steps": run.steps,
        "host_ms_per_step": None if config.device == "cpu" else round(1e3 * run.host_seconds / run.steps, 3),
        "preemptions": run.preemptions,
        **provenance(),
    }


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each workload."""
    config = engine_config(model, arguments, max_waiting=1 << 20)
    # Before the engine takes the device's memory.
    measured = measured_floor(model, config) if arguments.floor else None
    with loaded_core(model, config) as core:
        for name in arguments.workloads:
            workload = WORKLOADS[name]
            number = arguments.requests or default_requests(workload, core, quick=arguments.quick)
            warm_up(core, config, model, workload)
            repeats = 1 if arguments.quick else REPEATS
            run = measure_cell(core, model, workload, number, repeats, arguments.sampling)
            yield result_row(core, config, model, workload, number, run, arguments.sampling, measured)


def measured_floor(model: BenchmarkModel, config: EngineConfig) -> DeviceFloor:
    """What the present device takes for the model's products and KV at the configured batch."""
    device = torch.device(config.device)
    free_device(device)
    return DeviceFloor.measure(model.config, config.max_rows, device, getattr(torch, config.dtype))


def profile_model(model: BenchmarkModel, arguments: argparse.Namespace) -> None:
    """Print where the time of steps goes, for each workload with as many rows as need not be preempted."""
    vocabulary, length = model.config.vocab_size, model.config.block_length
    if arguments.profile == "decode":
        arguments.max_step_positions = arguments.max_step_positions or PROFILE_STEP_POSITIONS
    config = engine_config(model, arguments, max_waiting=1 << 20)
    page_tokens = config.page_size * length
    with loaded_core(model, config) as core:
        for place, name in enumerate(arguments.workloads):
            if arguments.profile == "decode":
                workload = decode_workload(WORKLOADS[name], length, config)
                pages = -(-(workload.prompt_tokens + workload.answer_tokens) // page_tokens)
                number = min(config.max_rows, core.info.pages // pages)
            else:
                workload = prefill_workload(WORKLOADS[name], length)
                number = prefill_number(workload, length, config)
            # A seed of its own: prompts that begin alike would be found in the prefix cache.
            requests = make_requests(workload, number, vocabulary, place, arguments.sampling)
            profile_steps(core, requests, torch.device(config.device), arguments.profile)


def default_requests(workload: Workload, core: EngineCore, *, quick: bool) -> int:
    """BATCHES of as many as run at once, by rows and by KV cache, or half as many of a quick run."""
    fitting = core.info.kv_capacity_tokens // (workload.prompt_tokens + workload.answer_tokens)
    requests = BATCHES[workload.name] * min(core.info.max_rows, fitting)
    return max(1, requests // 2) if quick else requests


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    first = rows[0]
    title = f"engine on {first['device']}, {first['dtype']}, {first['sampling']}, commit {first['commit']}"
    table = Table(title=title)
    for column in (
        "model", "workload", "requests", "rows", "tok/s", "floor", "of the floor", "of vLLM's, H200", "seconds",
        "steps", "host ms/step", "preempted",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "workload") else "right")
    for row in rows:
        floor, host, vllm = row["floor_tok_s"], row["host_ms_per_step"], row["vllm_tok_s"]
        table.add_row(
            row["model"],
            row["workload"],
            str(row["requests"]),
            str(row["rows"]),
            f"{row['tok_s']:,.0f}",
            "n/a" if floor is None else f"{floor:,}" + (" (here)" if row["floor_measured_here"] else ""),
            "n/a" if floor is None else f"{row['tok_s'] / floor:.0%}",
            "n/a" if vllm is None else f"{row['tok_s'] / vllm:.2f}x",
            f"{row['seconds']:.2f}",
            str(row["steps"]),
            "n/a" if host is None else f"{host:.2f}",
            str(row["preemptions"]),
        )
    console = Console(width=150)
    console.print(table)
    if (pairs := pairs_table(rows)) is not None:
        console.print(pairs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--requests", type=int, default=None, help="default: two full batches")
    parser.add_argument("--quick", action="store_true", help="half as many requests, and one run each")
    parser.add_argument("--sampling", default="greedy", choices=("greedy", "top"), help="how tokens are chosen")
    parser.add_argument("--floor", action="store_true", help="measure the floors here instead of taking the H200's")
    parser.add_argument(
        "--profile", nargs="?", const="decode", choices=KINDS, help="instead of timing, print where steps spend time"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        if arguments.profile:
            profile_model(MODELS[name], arguments)
            continue
        for row in measure_model(MODELS[name], arguments):
            rows.append(row)
            # At once: a later cell that fails must not take it along.
            if not arguments.no_results:
                append("engine", [row])
    if rows:
        show(rows)
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
