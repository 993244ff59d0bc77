"""Measures one request on an idle engine: tokens a second of a single answer, and the time to its first token.

    python -m benchmarks.latency [--models block-1.2B ...] [--floor]

Through the engine core, as its process drives it: from `add` to the return of the step that gives the caller the
tokens. Random weights and prompts, greedy, EOS ignored. Appends its rows to benchmarks/results/latency.jsonl and ends
with one JSON line.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.anchors import vllm_single
from benchmarks.floor import step_floor
from benchmarks.harness import (
    add_engine_arguments,
    describe,
    engine_config,
    free_device,
    loaded_core,
    make_requests,
)
from benchmarks.models import MODELS, BenchmarkModel, Workload
from benchmarks.results import append, provenance
from engine.core import EngineCore
from engine.types import GenerationRequest

SINGLE = Workload("single", prompt_tokens=128, answer_tokens=512)
FIRST = Workload("first", prompt_tokens=2048, answer_tokens=1)
SINGLE_REPEATS, FIRST_REPEATS = 3, 20
WARM_UP_REPEATS = 3


def answer_one(core: EngineCore, request: GenerationRequest) -> tuple[float, float]:
    """Seconds to the first tokens of an answer, and to all of it."""
    started = time.perf_counter()
    core.add([(request.request_id, request)])
    first, tokens = 0.0, 0
    while tokens < request.params.max_tokens:
        report = core.step()
        if report is None:
            continue
        tokens += report.deltas.tokens
        first = first or time.perf_counter() - started
    seconds = time.perf_counter() - started
    # The overlapped loop may be a step ahead.
    while core.has_work:
        core.step()
    return first, seconds


def repeated(core: EngineCore, workload: Workload, vocab_size: int, repeats: int) -> list[tuple[float, float]]:
    """`answer_one` for different prompts, after a warm-up."""
    requests = make_requests(workload, WARM_UP_REPEATS + repeats, vocab_size)
    return [answer_one(core, request) for request in requests][WARM_UP_REPEATS:]


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the single answer, and one for the first token."""
    config = engine_config(model, arguments, max_waiting=1)
    device, vocabulary = torch.device(config.device), model.config.vocab_size
    floor = None
    if arguments.floor:
        free_device(device)
        context = (SINGLE.prompt_tokens + SINGLE.answer_tokens // 2) // model.config.block_length
        seconds = step_floor(model.config, 1, context, device, getattr(torch, config.dtype))
        floor = round(model.config.block_length / seconds, 1)
    with loaded_core(model, config) as core:
        single = repeated(core, SINGLE, vocabulary, SINGLE_REPEATS)
        first = repeated(core, FIRST, vocabulary, FIRST_REPEATS)
        common = {"bench": "latency", **describe(core, config), "requests": 1, "rows": 1}
    vllm_tok_s, vllm_ttft_ms = vllm_single(model.name)
    seconds = statistics.median(total for _, total in single)
    times = [1e3 * seconds for seconds, _ in first]
    return [
        {
            **common,
            "workload": f"{SINGLE.prompt_tokens} in {SINGLE.answer_tokens} out",
            "tok_s": SINGLE.answer_tokens / seconds,
            "floor_tok_s": floor,
            "vllm_tok_s": vllm_tok_s,
            "ttft_ms": 1e3 * statistics.median(first for first, _ in single),
            "seconds": seconds,
            **provenance(),
        },
        {
            **common,
            "workload": f"{FIRST.prompt_tokens} in",
            "ttft_ms": statistics.median(times),
            "ttft_ms_worst": max(times),
            "vllm_ttft_ms": vllm_ttft_ms,
            **provenance(),
        },
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"one request, {rows[0]['device']}, {rows[0]['dtype']}, commit {rows[0]['commit']}")
    for column in ("model", "workload", "tok/s", "floor", "vLLM, H200", "first token, ms", "worst", "vLLM, H200"):
        table.add_column(column, justify="left" if column in ("model", "workload") else "right")
    for row in rows:
        rate, floor, worst = row.get("tok_s"), row.get("floor_tok_s"), row.get("ttft_ms_worst")
        table.add_row(
            row["model"],
            row["workload"],
            "" if rate is None else f"{rate:,.0f}",
            "" if floor is None else f"{floor:,.0f}",
            str(row.get("vllm_tok_s") or ""),
            f"{row['ttft_ms']:.2f}",
            "" if worst is None else f"{worst:.2f}",
            str(row.get("vllm_ttft_ms") or ""),
        )
    Console(width=120).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, ["block-1.2B"], workloads=())
    parser.add_argument("--floor", action="store_true", help="measure the floor of the single answer as well")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure_model(MODELS[name], arguments)
    show(rows)
    if not arguments.no_results:
        append("latency", rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
