"""Measures the engine under traffic as users make it, against batches of one length in the same run.

    python -m benchmarks.mixed [--models block-1.2B ...] [--workloads P D] [--batches N] [--saturated]

Log-normal lengths with the means of the workload, answers that end by EOS, a third each greedy, at temperature 1 and
with top-k and top-p, shuffled free pages (benchmarks/traffic.py). First a batch of fixed lengths measures capacity;
then requests arrive as a Poisson process at 90% of it, fed by the clock while the engine steps. Tokens are counted from
the moment a share of the requests has arrived to the last arrival; once that has had its first tokens, what is open is
given up. Where answers are longer than prompts, the batch begins in the steady state (benchmarks/steady_state.py), and
the share is a tenth; of what was opened before, nothing is counted but the tokens that come in the counted time.
Otherwise it begins empty, and the share is a third: rows are open for a short time then, and most of their cost is
their prompt, which comes before the first token. "rows open" are those that decode in the first tenth of the counted
time, in all of it, and in its last tenth, on average: alike where the state was steady, and as many as the batch has
where the engine could not keep up.
With --saturated, all mixed requests come at once instead, and the whole time counts, as for fixed lengths. Appends a
row for each cell to benchmarks/results/mixed.jsonl and ends with one JSON line.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.drive import Clock, Course, Drivable, Drive, at_once
from benchmarks.harness import add_engine_arguments, describe, engine_config, loaded_core, warm_up
from benchmarks.models import MODELS, WORKLOADS, BenchmarkModel, Workload
from benchmarks.results import append, provenance
from benchmarks.steady_state import open_rows, rows_in_steady_state
from benchmarks.traffic import (
    LONGEST,
    Traffic,
    always_say_eos,
    fixed_requests,
    shuffled_pool,
)
from engine.core import EngineCore
from engine.types import GenerationRequest

OFFERED = 0.9
"""Share of the capacity."""
REQUIRED = 0.85
"""Share of the fixed-length figure that mixed traffic has to reach."""
FROM_EMPTY_RAMP = 1 / 3
STEADY_RAMP = 0.1
"""Share of the requests after whose arrival tokens are counted."""
FIXED_BATCHES = 2
"""Fixed and saturated requests, in full batches, as benchmarks.engine has them."""
FROM_EMPTY_BATCHES = 4
STEADY_BATCHES = 1
"""Requests that arrive, in full batches. One arrives in a little more than the time of one answer."""
EDGE = 0.1
"""Share of the counted time that tells of its start, or of its end."""
PERCENTILES = (50, 90, 99)


def run_at_once(core: Drivable, requests: Sequence[GenerationRequest]) -> Course:
    """All of them from the start to their ends."""
    drive = Drive(core)
    drive.begin(at_once(requests))
    return drive.to_the_end()


def run_arrivals(
    core: Drivable, traffic: Traffic, number: int, steady_rows: int, clock: Clock | None = None
) -> tuple[Course, float, float]:
    """Let `number` requests arrive; what came of it, and of that what is counted: from when to when.

    The batch begins in the steady state, which takes `steady_rows` rows at most, or empty where that is 0. Goes on
    until the last arrival has had its first tokens. Raises RuntimeError where the steady state is not found.
    """
    drive = Drive(core, clock)
    arrivals = traffic.arrivals(number)
    if steady_rows:
        open_rows(drive, traffic, rows_in_steady_state(drive, traffic, number, steady_rows))
    drive.begin(arrivals)
    course = drive.until(lambda: drive.all_came and drive.all_speak)
    drive.stop()
    ramp = STEADY_RAMP if steady_rows else FROM_EMPTY_RAMP
    return course, arrivals[int(ramp * number)].seconds, arrivals[-1].seconds


def measure_cell(
    core: EngineCore, model: BenchmarkModel, workload: Workload, rows: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Capacity with fixed lengths, then mixed traffic; the figures of both."""
    generator = np.random.default_rng(1)
    vocabulary = model.config.vocab_size
    fixed = run_at_once(core, fixed_requests(workload, FIXED_BATCHES * rows, vocabulary, generator))
    capacity = fixed.tokens / fixed.seconds
    steady = begins_steady(workload) and not arguments.saturated
    number = arriving(workload, rows, arguments)
    traffic = Traffic(workload, vocabulary, OFFERED * capacity, generator)
    preemptions = core.preemptions
    if arguments.saturated:
        course = run_at_once(core, traffic.fresh(number))
        begin, end = 0.0, course.seconds
    else:
        most = min(rows, core.info.kv_capacity_tokens // tokens_open(workload)) if steady else 0
        course, begin, end = run_arrivals(core, traffic, number, most)
    return {
        "workload": workload.name,
        "arrivals": "at once" if arguments.saturated else "poisson",
        "begins": "steady" if steady else "empty",
        "requests": number,
        "requests_per_second": None if arguments.saturated else traffic.offered / workload.answer_tokens,
        **figures(course, begin, end, capacity, None if arguments.saturated else traffic.offered),
        "preemptions": core.preemptions - preemptions,
    }


def figures(course: Course, begin: float, end: float, capacity: float, offered: float | None) -> dict[str, Any]:
    """What a row says of the time from `begin` to `end`, which is counted. `offered` tok/s, None if all is at once."""
    # The last step of a course that counts to its end returns just then.
    seconds, past = end - begin, end + 1e-9
    tok_s = course.tokens_between(begin, past) / seconds
    edge = EDGE * seconds
    return {
        "rows": course.rows,
        "rows_open": course.rows_between(begin, past),
        "rows_open_at_start": course.rows_between(begin, begin + edge),
        "rows_open_at_end": course.rows_between(end - edge, past),
        "tok_s": tok_s,
        "fixed_tok_s": capacity,
        "of_fixed": tok_s / capacity,
        "offered_tok_s": offered,
        "of_offered": None if offered is None else tok_s / offered,
        "counted_from_seconds": begin,
        "window_seconds": seconds,
        "seconds": course.seconds,
        "ttft_ms": percentiles(course.first_token_times(begin, past)),
        "block_ms": percentiles(course.block_times(begin, past)),
    }


def begins_steady(workload: Workload) -> bool:
    """Whether the batch begins in the steady state rather than empty."""
    return workload.answer_tokens > workload.prompt_tokens


def tokens_open(workload: Workload) -> int:
    """Tokens that a request in the steady state has in the KV cache, on average, with some room for it to go on.

    Of a log-normal answer exp(SIGMA^2) / 2 of the mean, 0.64, are written on average where it is found.
    """
    return workload.prompt_tokens + 3 * workload.answer_tokens // 4


def arriving(workload: Workload, rows: int, arguments: argparse.Namespace) -> int:
    """How many mixed requests arrive."""
    if arguments.requests is not None:
        number: int = arguments.requests
        return number
    if arguments.saturated:
        return FIXED_BATCHES * rows
    usual = STEADY_BATCHES if begins_steady(workload) else FROM_EMPTY_BATCHES
    return (usual if arguments.batches is None else arguments.batches) * rows


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
    # Besides the requests that arrive, a batch of those that are under way before.
    largest = rows + max(arriving(WORKLOADS[name], rows, arguments) for name in arguments.workloads)
    config = engine_config(model, arguments, max_waiting=max(largest, FIXED_BATCHES * rows))
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
        caption=f"at least {REQUIRED:.0%} of the fixed-length figure is required; rows open at start, mean, end",
    )
    for column in (
        "model", "workload", "arrivals", "requests", "rows open", "offered", "tok/s", "of offered", "fixed", "of fixed",
        "first token, ms, p50 / p99", "block, ms, p50 / p99", "preempted",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "workload", "arrivals") else "right")
    for row in rows:
        offered = row["offered_tok_s"]
        open_rows = (row[f"rows_open{when}"] for when in ("_at_start", "", "_at_end"))
        table.add_row(
            row["model"],
            row["workload"],
            row["arrivals"],
            str(row["requests"]),
            " / ".join(f"{rows_open:.0f}" for rows_open in open_rows),
            "n/a" if offered is None else f"{offered:,.0f}",
            f"{row['tok_s']:,.0f}",
            "n/a" if offered is None else f"{row['of_offered']:.1%}",
            f"{row['fixed_tok_s']:,.0f}",
            f"{row['of_fixed']:.1%}" + ("" if row["of_fixed"] >= REQUIRED else " !"),
            *(f"{row[what].get('p50')} / {row[what].get('p99')}" for what in ("ttft_ms", "block_ms")),
            str(row["preemptions"]),
        )
    Console(width=190).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.set_defaults(workloads=["P", "D"])
    parser.add_argument(
        "--batches",
        type=int,
        default=None,
        help=f"mixed requests that arrive, in full batches (default: {STEADY_BATCHES} if the batch begins steady, else "
        f"{FROM_EMPTY_BATCHES})",
    )
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
