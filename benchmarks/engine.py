"""Measures the engine core alone, without processes and HTTP: generated tokens a second of whole batches.

    python -m benchmarks.engine [--models block-1.2B ...] [--workloads P D X] [--quick] [--sync] [--no-graphs]
    python -m benchmarks.engine --profile

Random weights, random prompts, greedy, EOS ignored. All requests are submitted at once to the real scheduler, after
graphs are captured and kernels compiled; tok/s is generated tokens over the whole wall time, prefill included. A run
under 30 s is repeated, and the median of three kept. Prints a table with the floors, appends a row for each cell to
benchmarks/results/engine.jsonl and ends with one JSON line.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device_waits import counted_waits
from benchmarks.models import MODELS, WORKLOADS, BenchmarkModel, Workload
from benchmarks.profile import PROFILE_ANSWER_TOKENS, PROFILE_STEP_POSITIONS, profile_decode
from benchmarks.results import append, provenance
from engine.config import DTYPES, EngineConfig
from engine.core import EngineCore
from engine.model.build import build_model
from engine.options import resolve_options
from engine.process_config import EngineOptions
from engine.types import GenerationRequest, SamplingParams
from engine.weights import random_weights
from kernels.dispatch import select_kernels

BATCHES = {"P": 2, "D": 2, "X": 1}
"""Default number of requests, in full batches."""
REPEATED_UNDER_SECONDS = 30.0
REPEATS = 3
WARM_UP_STEPS = 4
"""Full steps of prefill before a workload is timed."""

_next_id = count()


@dataclass(frozen=True)
class Run:
    """One timed run of a workload."""

    seconds: float
    tokens: int
    rows: int
    """Largest batch reached."""
    steps: int
    preemptions: int
    host_seconds: float
    """Time in the core's calls outside waiting for the device. On the CPU this includes computing."""


def make_requests(workload: Workload, number: int, vocab_size: int, seed: int = 0) -> list[GenerationRequest]:
    """Random prompts; greedy answers that end at their length only."""
    generator = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=workload.answer_tokens, temperature=0, seed=0, ignore_eos=True)
    prompts = generator.integers(1, vocab_size, (number, workload.prompt_tokens))
    return [
        GenerationRequest(request_id=next(_next_id), prompt_token_ids=tuple(prompt.tolist()), params=params)
        for prompt in prompts
    ]


def run_requests(core: EngineCore, requests: list[GenerationRequest]) -> Run:
    """Submit all requests at once and step until all are answered. Raises RuntimeError if an answer is cut short."""
    tokens, rows, steps = 0, 0, 0
    preemptions = core.preemptions
    in_core = 0.0
    with counted_waits() as waits:
        started = time.perf_counter()
        core.add([(request.request_id, request) for request in requests])
        while core.has_work:
            called = time.perf_counter()
            report = core.step()
            in_core += time.perf_counter() - called
            if report is None:
                continue
            tokens += sum(len(delta.token_ids) for _, delta in report.deltas)
            rows = max(rows, report.rows)
            steps += 1
        seconds = time.perf_counter() - started
    expected = sum(request.params.max_tokens for request in requests)
    if tokens != expected:
        raise RuntimeError(f"{tokens} tokens came and not {expected}: an answer ended early")
    return Run(seconds, tokens, rows, steps, core.preemptions - preemptions, in_core - waits.seconds)


@contextmanager
def loaded_core(model: BenchmarkModel, config: EngineConfig) -> Iterator[EngineCore]:
    """An engine core with random weights."""
    device = torch.device(config.device)
    # What the core before this one has left counts as taken until it is given back.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    kernels = select_kernels(device)
    tensors = random_weights(model.config, getattr(torch, config.dtype), device, seed=0)
    core = EngineCore(
        name=model.name, config=config, model=build_model(model.config, tensors, kernels), kernels=kernels
    )
    # As the engine process does: what start-up made need not be looked at by the garbage collector again.
    gc.freeze()
    try:
        yield core
    finally:
        gc.unfreeze()


def warm_up(core: EngineCore, config: EngineConfig, model: BenchmarkModel, workload: Workload) -> None:
    """A few full steps of the workload's prompts, with answers of two blocks."""
    length = model.config.block_length
    number = max(1, WARM_UP_STEPS * config.max_step_positions * length // workload.prompt_tokens)
    short = Workload(workload.name, workload.prompt_tokens, answer_tokens=2 * length)
    run_requests(core, make_requests(short, min(number, config.max_rows), model.config.vocab_size))


def measure_cell(core: EngineCore, model: BenchmarkModel, workload: Workload, requests: int, repeats: int) -> Run:
    """The timed run, or the median of `repeats` where one takes under REPEATED_UNDER_SECONDS."""
    runs: list[Run] = []
    for seed in range(1, repeats + 1):
        runs.append(run_requests(core, make_requests(workload, requests, model.config.vocab_size, seed)))
        if runs[-1].seconds > REPEATED_UNDER_SECONDS:
            return runs[-1]
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def result_row(
    core: EngineCore, config: EngineConfig, model: BenchmarkModel, workload: Workload, requests: int, run: Run
) -> dict[str, Any]:
    """One line of the results."""
    on_device = config.device != "cpu"
    return {
        "bench": "engine",
        "model": model.name,
        "workload": workload.name,
        "dtype": config.dtype,
        "device": core.info.device,
        "devices": 1,
        "requests": requests,
        "rows": run.rows,
        "tok_s": run.tokens / run.seconds,
        "floor_tok_s": model.floor(workload.name, rows=config.max_rows, dtype=config.dtype, device=core.info.device),
        "seconds": run.seconds,
        "steps": run.steps,
        "host_ms_per_step": round(1e3 * run.host_seconds / run.steps, 3) if on_device else None,
        "preemptions": run.preemptions,
        "max_step_positions": config.max_step_positions,
        "overlapped": config.overlapped,
        "cuda_graphs": on_device and config.cuda_graphs,
        **provenance(),
    }


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each workload."""
    numbers = {name: arguments.requests or _default_requests(name, model, arguments) for name in arguments.workloads}
    config = engine_config(model, arguments, max_waiting=max(*numbers.values(), arguments.rows or model.rows))
    with loaded_core(model, config) as core:
        for name, number in numbers.items():
            workload = WORKLOADS[name]
            warm_up(core, config, model, workload)
            run = measure_cell(core, model, workload, number, repeats=1 if arguments.quick else REPEATS)
            yield result_row(core, config, model, workload, number, run)


def profile_model(model: BenchmarkModel, arguments: argparse.Namespace) -> None:
    """Print where the time of decode steps goes, for each workload with as many rows as need not be preempted."""
    arguments.max_step_positions = arguments.max_step_positions or PROFILE_STEP_POSITIONS
    config = engine_config(model, arguments, max_waiting=arguments.rows or model.rows)
    page_tokens = config.page_size * model.config.block_length
    with loaded_core(model, config) as core:
        for name in arguments.workloads:
            timed = WORKLOADS[name]
            workload = Workload(name, timed.prompt_tokens, max(timed.answer_tokens, PROFILE_ANSWER_TOKENS))
            pages = -(-(workload.prompt_tokens + workload.answer_tokens) // page_tokens)
            number = min(config.max_rows, core.info.pages // pages)
            profile_decode(core, make_requests(workload, number, model.config.vocab_size), torch.device(config.device))


def engine_config(model: BenchmarkModel, arguments: argparse.Namespace, max_waiting: int) -> EngineConfig:
    """The engine's settings as an operator would get them, but for what the command line says."""
    options = EngineOptions(
        device=arguments.device,
        dtype=arguments.dtype,
        max_rows=arguments.rows or model.rows,
        max_waiting=max_waiting,
        max_step_positions=arguments.max_step_positions,
        overlapped=False if arguments.sync else None,
        cuda_graphs=False if arguments.no_graphs else None,
    )
    return resolve_options(options, model.config)


def _default_requests(workload: str, model: BenchmarkModel, arguments: argparse.Namespace) -> int:
    requests = BATCHES[workload] * (arguments.rows or model.rows)
    return max(1, requests // 2) if arguments.quick else requests


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    first = rows[0]
    table = Table(title=f"engine on {first['device']}, {first['dtype']}, commit {first['commit']}")
    for column in (
        "model", "workload", "requests", "rows", "tok/s", "floor", "of the floor", "seconds", "steps", "host ms/step",
        "preempted",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "workload") else "right")
    for row in rows:
        floor, host = row["floor_tok_s"], row["host_ms_per_step"]
        table.add_row(
            row["model"],
            row["workload"],
            str(row["requests"]),
            str(row["rows"]),
            f"{row['tok_s']:,.0f}",
            "n/a" if floor is None else f"{floor:,}",
            "n/a" if floor is None else f"{row['tok_s'] / floor:.0%}",
            f"{row['seconds']:.2f}",
            str(row["steps"]),
            "n/a" if host is None else f"{host:.2f}",
            str(row["preemptions"]),
        )
    Console(width=130).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS, metavar="P|D|X")
    parser.add_argument("--rows", type=int, default=None, help="rows of the batch (default: the floor's)")
    parser.add_argument("--requests", type=int, default=None, help="default: two full batches, of X one")
    parser.add_argument("--quick", action="store_true", help="half as many requests, and one run each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--sync", action="store_true", help="commit each step before the next is planned")
    parser.add_argument("--no-graphs", action="store_true", help="launch the kernels of a step one by one")
    parser.add_argument("--max-step-positions", type=int, default=None, help="default: the engine's own")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--profile", action="store_true", help="instead of timing, print where decode steps spend time")
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
