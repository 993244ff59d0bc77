"""Soaks a real server, and looks whether anything leaks, fails or changes.

    python -m benchmarks.soak --minutes 8 --model default|block-302M [--device cuda]

Starts `blockserve serve`, measures how much it can do, then sends it 90 % of that for so many minutes: requests at
random moments, of random lengths, greedy and sampled, whole and streamed, one in ten of them given up half way; and
kills its engine process twice. Once a second it looks at metrics and processes. Afterwards:

- rows, pages and queue are empty, and no process has more descriptors or threads than when it was warm;
- no process's memory, nor the GPU's, grew between the first and the last quarter of its life;
- no request failed but those that an engine took along, and no task or thread of the client is left;
- each of a random sample of the answers equals the one that its request gets alone (`benchmarks.soak.oracle`).

Prints a table, appends a line to benchmarks/results/soak.jsonl and ends with it; exits with 1 if a check fails.
"""

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results import append, provenance
from benchmarks.soak.course import KILLS, Plan, Soaked, soak
from benchmarks.soak.model import MODEL_NAMES, SoakModel, soak_model
from benchmarks.soak.oracle import Difference, Oracle
from benchmarks.soak.watch import Watcher, grown, growth, leaks
from engine.device import device_name

ROWS = {"cpu": 64, "cuda": 512}
PAGES_PER_ROW = 6
"""Fewer than an average request comes to hold: some are preempted."""


@contextmanager
def serving(model: SoakModel, arguments: argparse.Namespace, directory: Path) -> Iterator[tuple[str, int]]:
    """A server's URL and its supervisor's process id. What it logged goes to standard error in the end."""
    model.write(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pages = max(PAGES_PER_ROW * arguments.rows, model.pages_of_longest)
    flags = [*model.serve_arguments(directory, arguments.rows, pages), "--device", arguments.device]
    flags += ["--port", str(port), "--served-model-name", "soak", "--log-level", "warning"]
    if arguments.threads is not None:
        flags += ["--threads", str(arguments.threads)]
    log = directory / "server.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "server.cli", "serve", *flags]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server exited with {process.returncode} before it was ready")


def judged_differences(model: SoakModel, soaked: Soaked, seconds: float) -> list[Difference]:
    """Of the answers under load from those alone, as many as the oracle can look at in so many seconds."""
    found: list[Difference] = []
    if not soaked.different:
        return found
    oracle = Oracle(model.config, model.tensors())
    end = time.monotonic() + seconds
    for ask, loaded, alone in soaked.different:
        found.append(oracle.compare(ask, loaded, alone))
        if time.monotonic() > end:
            break
    return found


def judge(model: SoakModel, soaked: Soaked, judged: list[Difference]) -> dict[str, list[str]]:
    """What is wrong, by check; nothing where a check passes."""
    unexpected = [
        reason
        for moment, reason in soaked.tally.failures
        if not any(start <= moment <= end for start, end in soaked.outages)
    ]
    restarts = soaked.last.metrics.get("engine_restarts_total")
    wrong = [
        f"token {found.place} scores {found.deficit:.4g} below the best: {found.ask}"
        for found in judged
        if not found.deficit <= model.tie
    ]
    unanswered = sum(asked.alone is None for asked in soaked.asked)
    if not soaked.asked or unanswered:
        wrong.append(f"{len(soaked.asked)} requests were asked alone, and {unanswered} got no answer")
    return {
        "idle": leaks(soaked.warm, soaked.last),
        "memory": [
            f"{name} grew from {first:.0f} to {last:.0f} MiB"
            for name, (first, last) in growth(soaked.snapshots).items()
            if grown(first, last)
        ],
        "failures": unexpected,
        "engines": [] if restarts == KILLS else [f"{KILLS} engines were killed, and {restarts} started again"],
        "client": soaked.leftovers,
        "answers": wrong,
    }


def result_row(
    model: SoakModel,
    arguments: argparse.Namespace,
    soaked: Soaked,
    judged: list[Difference],
    passed: dict[str, bool],
) -> dict[str, Any]:
    """The line of the results."""
    outcomes = soaked.tally.outcomes
    rows = [snapshot.metrics.get("requests_running", 0.0) for snapshot in soaked.snapshots]
    return {
        "bench": "soak",
        "model": model.name,
        "workload": "soak",
        "dtype": model.dtype,
        "device": device_name(torch.device(arguments.device)),
        "devices": 1,
        "requests": outcomes.total(),
        "rows": int(max(rows)),
        "tok_s": round(soaked.tally.tokens / soaked.seconds, 1),
        "floor_tok_s": None,
        "seconds": round(soaked.seconds, 1),
        "capacity_tok_s": round(soaked.capacity.tokens_s, 1),
        "max_rows": arguments.rows,
        "median_rows": statistics.median(rows),
        "most_waiting": int(max(snapshot.metrics.get("requests_waiting", 0) for snapshot in soaked.snapshots)),
        "most_pages": int(max(snapshot.metrics.get("kv_pages_used", 0) for snapshot in soaked.snapshots)),
        **{name: outcomes[name] for name in ("answered", "aborted", "refused", "failed")},
        "preemptions": int(soaked.last.metrics.get("preemptions_total", 0)),
        "kills": KILLS,
        "outage_seconds": [round(end - start, 1) for start, end in soaked.outages],
        "checked": len(soaked.asked),
        "different": len(soaked.different),
        "judged": len(judged),
        "worst_deficit": round(max((found.deficit for found in judged), default=0.0), 6),
        "tie": model.tie,
        "mebibytes": {name: [round(a), round(b)] for name, (a, b) in growth(soaked.snapshots).items()},
        "passed": passed,
        **provenance(),
    }


def show(row: dict[str, Any], problems: dict[str, list[str]]) -> None:
    """Print the table, and what is wrong."""
    table = Table("what", "figure", title=f"soak of {row['model']} on {row['device']}, {row['dtype']}")
    for name, value in row.items():
        if name in ("bench", "model", "workload", "dtype", "device", "devices", "passed", "mebibytes", "floor_tok_s"):
            continue
        table.add_row(name.replace("_", " "), str(value))
    for name, (first, last) in row["mebibytes"].items():
        table.add_row(f"{name}, first and last quarter", f"{first} and {last} MiB")
    for name, found in problems.items():
        table.add_row(f"check: {name}", "passed" if not found else f"FAILED, {len(found)}")
    console = Console(width=120)
    console.print(table)
    for name, found in problems.items():
        for problem in found[:10]:
            console.print(f"{name}: {problem[:1000]}", markup=False, highlight=False)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="of load")
    parser.add_argument(
        "--check-minutes",
        type=float,
        default=1,
        help="to ask sampled requests again, each alone; and again as much, at most, for the oracle",
    )
    parser.add_argument("--model", default="default", choices=MODEL_NAMES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=None, help="rows of the engine (default: 64 on the CPU, else 512)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the engine")
    parser.add_argument("--window", type=float, default=10, help="seconds of each window that measures the capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or ROWS[arguments.device]
    return arguments


def main() -> int:
    """Soak, judge, print, keep; the exit code."""
    arguments = parse()
    model = soak_model(arguments.model)
    plan = Plan(
        rows=arguments.rows,
        window=arguments.window,
        seconds=60 * arguments.minutes,
        check_seconds=60 * arguments.check_minutes,
        seed=arguments.seed,
    )
    with tempfile.TemporaryDirectory() as directory, serving(model, arguments, Path(directory)) as (url, pid):
        soaked = asyncio.run(soak(Watcher(url, pid, has_gpu=arguments.device != "cpu"), model, plan))
    judged = judged_differences(model, soaked, plan.check_seconds)
    problems = judge(model, soaked, judged)
    row = result_row(model, arguments, soaked, judged, {name: not found for name, found in problems.items()})
    show(row, problems)
    if not arguments.no_results:
        append("soak", [row])
    print(json.dumps(row))
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
