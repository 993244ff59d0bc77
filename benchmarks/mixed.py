"""Measures the engine under traffic as users make it, against batches of one length in the same run.

    python -m benchmarks.mixed [--models block-1.2B ...] [--workloads P D] [--batches 4] [--saturated]

Log-normal lengths with the means of the workload, answers that end by EOS, a third each greedy, at temperature 1 and
with top-k and top-p, shuffled free pages (benchmarks/traffic.py). First a batch of fixed lengths measures capacity;
then requests arrive as a Poisson process at 90% of it, fed by the clock while the engine steps. Tokens are counted from
the moment a third of the requests has arrived to the last arrival: before it the batch grows, behind it it shrinks.
With --saturated, all mixed requests come at once instead, and the whole time counts, as for fixed lengths. Appends a
row for each cell to benchmarks/results/mixed.jsonl and ends with one JSON line.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness import add_engine_arguments, describe, engine_config, loaded_core, warm_up
from benchmarks.models import MODELS, WORKLOADS, BenchmarkModel, Workload
from benchmarks.results import append, provenance
from benchmarks.traffic import (
    LONGEST,
    Arrival,
    always_say_eos,
    fixed_requests,
    mixed_requests,
    poisson,
    shuffled_pool,
    wanted_tokens,
)
from engine.core import EngineCore
from engine.types import GenerationRequest

OFFERED = 0.9
"""Share of the capacity."""
REQUIRED = 0.85
"""Share of the fixed-length figure that mixed traffic has to reach."""
RAMP = 1 / 3
"""Share of the requests after whose arrival tokens are counted."""
FIXED_BATCHES = 2
PERCENTILES = (50, 90, 99)


@dataclass
class Course:
    """What happened to a list of arrivals. Moments are seconds from its start."""

    seconds: float = 0.0
    tokens: int = 0
    rows: int = 0
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """(moment of its return, rows, tokens) of each step that gave something."""
    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    """(moment of arrival, seconds from there to the first tokens)."""

    def tokens_between(self, begin: float, end: float) -> int:
        """Tokens given in [begin, end)."""
        return sum(tokens for moment, _, tokens in self.steps if begin <= moment < end)

    def first_token_times(self, begin: float, end: float) -> list[float]:
        """Seconds to the first tokens of the requests that arrived in [begin, end)."""
        return [seconds for arrival, seconds in self.first_tokens if begin <= arrival < end]

    def block_times(self, begin: float, end: float) -> np.ndarray:
        """Seconds between a row's blocks, once for each row of each step in [begin, end): those between steps."""
        moments, rows, _ = np.array([(begin, 0, 0), *self.steps]).T
        counted = np.where((begin <= moments[1:]) & (moments[1:] < end), rows[1:], 0).astype(int)
        return np.diff(moments).repeat(counted)


def drive(core: EngineCore, arrivals: Sequence[Arrival]) -> Course:
    """Submit each request at its moment, step until all are answered, sleep where there is nothing to do.

    Raises RuntimeError where another number of tokens comes than the requests ask for.
    """
    course = Course()
    moments = {arrival.request.request_id: arrival.seconds for arrival in arrivals}
    submitted = 0
    started = time.perf_counter()
    while submitted < len(arrivals) or core.has_work:
        now = time.perf_counter() - started
        due = submitted
        while due < len(arrivals) and arrivals[due].seconds <= now:
            due += 1
        if due > submitted:
            core.add([(arrival.request.request_id, arrival.request) for arrival in arrivals[submitted:due]])
            submitted = due
        if not core.has_work:
            time.sleep(max(0.0, arrivals[submitted].seconds - now))
            continue
        report = core.step()
        if report is None:
            continue
        moment = time.perf_counter() - started
        tokens = report.deltas.tokens
        course.steps.append((moment, report.rows, tokens))
        course.tokens += tokens
        course.rows = max(course.rows, report.rows)
        for _, delta in report.deltas:
            if delta.timing is not None:
                arrived = moments[delta.request_id]
                course.first_tokens.append((arrived, moment - arrived))
    course.seconds = time.perf_counter() - started
    if course.tokens != (wanted := wanted_tokens([arrival.request for arrival in arrivals])):
        raise RuntimeError(f"{course.tokens} tokens came and not {wanted}: answers did not end where they should")
    return course


def at_once(requests: Sequence[GenerationRequest]) -> list[Arrival]:
    """All of them at the start."""
    return [Arrival(0.0, request) for request in requests]


def measure_cell(
    core: EngineCore, model: BenchmarkModel, workload: Workload, rows: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Capacity with fixed lengths, then mixed traffic; the figures of both."""
    generator = np.random.default_rng(1)
    vocabulary = model.config.vocab_size
    fixed = drive(core, at_once(fixed_requests(workload, FIXED_BATCHES * rows, vocabulary, generator)))
    capacity = fixed.tokens / fixed.seconds
    number = arguments.requests or (FIXED_BATCHES if arguments.saturated else arguments.batches) * rows
    requests = mixed_requests(workload, number, vocabulary, generator)
    rate = OFFERED * capacity / (wanted_tokens(requests) / number)
    preemptions = core.preemptions
    if arguments.saturated:
        course = drive(core, at_once(requests))
        begin, end = 0.0, course.seconds
    else:
        arrivals = list(map(Arrival, poisson(rate, number, generator), requests))
        course = drive(core, arrivals)
        begin, end = arrivals[int(RAMP * number)].seconds, arrivals[-1].seconds
    tok_s = course.tokens_between(begin, end + 1e-9) / (end - begin)
    return {
        "workload": workload.name,
        "arrivals": "at once" if arguments.saturated else "poisson",
        "requests": number,
        "rows": course.rows,
        "tok_s": tok_s,
        "fixed_tok_s": capacity,
        "of_fixed": tok_s / capacity,
        "offered_tok_s": None if arguments.saturated else OFFERED * capacity,
        "of_offered": None if arguments.saturated else tok_s / (OFFERED * capacity),
        "requests_per_second": None if arguments.saturated else rate,
        "window_seconds": end - begin,
        "seconds": course.seconds,
        "ttft_ms": percentiles(course.first_token_times(begin, end)),
        "block_ms": percentiles(course.block_times(begin, end)),
        "preemptions": core.preemptions - preemptions,
    }


def percentiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """PERCENTILES in milliseconds; of nothing, nothing."""
    if not len(seconds):
        return {}
    values = np.percentile(seconds, PERCENTILES)
    return {f"p{name}": round(1e3 * float(value), 2) for name, value in zip(PERCENTILES, values, strict=True)}


def with_room(model: BenchmarkModel, workloads: Sequence[Workload]) -> BenchmarkModel:
    """The model with a maximum length that the longest mixed requests fit into."""
    longest = max(LONGEST * (workload.prompt_tokens + workload.answer_tokens) for workload in workloads)
    config = model.config.model_copy(update={"max_length": max(longest, model.config.max_length)})
    return replace(model, config=config)


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each workload."""
    model = with_room(model, [WORKLOADS[name] for name in arguments.workloads])
    rows = arguments.rows or model.rows
    largest = max(arguments.requests or 0, arguments.batches * rows, FIXED_BATCHES * rows)
    config = engine_config(model, arguments, max_waiting=largest)
    change = partial(always_say_eos, eos_token_id=model.config.eos_token_id)
    found = []
    with loaded_core(model, config, make_pool=shuffled_pool, change=change) as core:
        for name in arguments.workloads:
            warm_up(core, config, model, WORKLOADS[name])
            figures = measure_cell(core, model, WORKLOADS[name], rows, arguments)
            row = {"bench": "mixed", **describe(core, config), **figures, **provenance()}
            if not arguments.no_results:
                append("mixed", [row])
            found.append(row)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    first = rows[0]
    table = Table(
        title=f"mixed traffic on {first['device']}, {first['dtype']}, commit {first['commit']}",
        caption=f"at least {REQUIRED:.0%} of the fixed-length figure is required",
    )
    for column in (
        "model", "workload", "arrivals", "requests", "rows", "tok/s", "fixed", "of fixed", "of offered",
        "first token, ms, p50 / p99", "block, ms, p50 / p99", "preempted",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "workload", "arrivals") else "right")
    for row in rows:
        offered = row["of_offered"]
        table.add_row(
            row["model"],
            row["workload"],
            row["arrivals"],
            str(row["requests"]),
            str(row["rows"]),
            f"{row['tok_s']:,.0f}",
            f"{row['fixed_tok_s']:,.0f}",
            f"{row['of_fixed']:.1%}" + ("" if row["of_fixed"] >= REQUIRED else " !"),
            "n/a" if offered is None else f"{offered:.1%}",
            *(f"{row[what].get('p50')} / {row[what].get('p99')}" for what in ("ttft_ms", "block_ms")),
            str(row["preemptions"]),
        )
    Console(width=170).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.set_defaults(workloads=["P", "D"])
    parser.add_argument("--batches", type=int, default=4, help="mixed requests that arrive, in full batches")
    parser.add_argument("--requests", type=int, default=None, help="mixed requests, instead of --batches")
    parser.add_argument("--saturated", action="store_true", help="mixed requests come at once, two batches of them")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep."""
    arguments = parse()
    rows = [row for name in arguments.models for row in measure_model(MODELS[name], arguments)]
    show(rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
