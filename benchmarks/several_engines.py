"""Measures one server with several engines beside one with one, and what a killed engine costs.

    python -m benchmarks.several_engines --model DIR --devices 0 1 [--open 1024] [--workloads D P]

Starts `blockserve serve` on the first device, then on all, and loads each as `blockserve bench` does, with `--open`
requests an engine. Throughput is the client's, and that of the server's own counter, of which the gain is. Under the
last load one engine is killed: no more requests may fail than it had, each with an error that says so, the others go
on, and it serves again. Appends the rows to benchmarks/results/several_engines.jsonl and ends with one JSON line; exits
with 1 if the dead engine cost more than its own requests or did not come back.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.front_end_scale import counted_bench
from benchmarks.models import WORKLOADS
from benchmarks.results import append, provenance
from benchmarks.server import Served, served

SPREAD = 0.5
"""Answers are between this share of a workload's tokens and as much above it: all of one length would end at once."""


def lengths(workload: str, scale: float) -> list[str]:
    """The flags of a workload: prompts of one length, answers of many."""
    shape = WORKLOADS[workload]
    prompt, answer = max(1, round(shape.prompt_tokens * scale)), max(2, round(shape.answer_tokens * scale))
    least, most = max(1, round(answer * (1 - SPREAD))), round(answer * (1 + SPREAD))
    return ["--prompt-tokens", str(prompt), "--output-tokens", f"{least}-{most}"]


def load(options: argparse.Namespace, server: Served, workload: str, seconds: float) -> dict[str, Any]:
    """The row of one load, with `server_tok_s`. `options.open` and `options.workers` are those of all engines here."""
    flags = [*lengths(workload, options.scale), "--no-stream"]
    return counted_bench(options, server, *flags, "--seconds", str(seconds), "--warm-up", str(options.warm_up))


def gauge(server: Served, name: str, engine: int) -> float:
    """What /metrics says of one engine."""
    wanted = f"blockserve_{name}", str(engine)
    return next((s.value for s in server.samples() if (s.name, s.labels.get("engine")) == wanted), 0.0)


def engine_pid(server: Served, engine: int) -> int:
    """The process of an engine: the supervisor's child that was started with its configuration."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    for child in children:
        if f"engine{engine}.json" in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    raise RuntimeError(f"engine {engine} is not running")


def most_held(server: Served, engine: int) -> float:
    """The most requests that an engine had at once within a second."""
    held = []
    for _ in range(5):
        held.append(gauge(server, "requests_running", engine) + gauge(server, "requests_waiting", engine))
        time.sleep(0.2)
    return max(held)


def kill_under_load(options: argparse.Namespace, server: Served, workload: str) -> dict[str, Any]:
    """Kill the last engine in the middle of a load; what failed, and how long until it was back."""
    engine = len(options.devices) - 1
    found: dict[str, Any] = {}
    seconds = max(options.seconds, 1.5 * server.seconds_to_ready)
    loading = threading.Thread(target=lambda: found.update(load(options, server, workload, seconds)))
    loading.start()
    time.sleep(options.warm_up + options.seconds / 3)
    held = most_held(server, engine)
    os.kill(engine_pid(server, engine), signal.SIGKILL)
    killed, deadline = time.monotonic(), time.monotonic() + 4 * server.seconds_to_ready + 30
    back = gone = False
    while not back and time.monotonic() < deadline:
        time.sleep(0.05)
        up = gauge(server, "engine_up", engine) == 1
        gone = gone or not up
        back = gone and up
    restart_s = time.monotonic() - killed
    loading.join()
    # Gauges are a quarter of a second behind.
    excused = held + 0.05 * options.open
    return {
        "held_by_the_dead": held,
        "failures": found["failures"],
        "errors": found["errors"],
        "tok_s": found["tok_s"],
        "server_tok_s": found["server_tok_s"],
        "restart_s": restart_s if back else None,
        "start_s": server.seconds_to_ready,
        "only_its_own_failed": found["failures"] <= excused,
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: one engine, all engines, and a death."""
    rows: list[dict[str, Any]] = []
    for devices in (options.devices[:1], options.devices):
        own = argparse.Namespace(**{**vars(options), "open": options.open * len(devices)})
        arguments = ["--devices", ",".join(devices), "--max-waiting", str(1 << 20), *options.server_arguments]
        with served(options.model, None, arguments) as server:
            for workload in options.workloads:
                row = load(own, server, workload, options.seconds)
                rows.append({**row, "bench": "several_engines", "workload": workload, "devices": devices})
            if len(devices) > 1:
                death = kill_under_load(own, server, options.workloads[0])
                rows.append({**death, "bench": "several_engines", "workload": options.workloads[0], "devices": devices})
    return [{**row, **provenance()} for row in rows]


def show(rows: list[dict[str, Any]]) -> None:
    """Print throughput with its gain over one engine, and the death."""
    *loads, death = rows
    single = {row["workload"]: row["server_tok_s"] for row in loads if len(row["devices"]) == 1}
    table = Table(title=f"several engines, commit {death['commit']}")
    for column in ("workload", "devices", "client's tok/s", "server's", "of one", "failed"):
        table.add_column(column, justify="right")
    for row in loads:
        gain = f"{row['server_tok_s'] / single[row['workload']]:.2f}x"
        rates = (f"{row[name]:,.0f}" for name in ("tok_s", "server_tok_s"))
        table.add_row(row["workload"], " ".join(row["devices"]), *rates, gain, str(row["failures"]))
    Console(width=100).print(table)
    back = "it did not come back" if death["restart_s"] is None else f"back after {death['restart_s']:.1f} s"
    rate = f"{death['server_tok_s']:,.0f} tok/s"
    print(
        f"an engine with {death['held_by_the_dead']:.0f} requests was killed: {death['failures']} failed "
        f"({death['errors']}), {back} (first start: {death['start_s']:.1f} s), {rate} over it all"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: of this process)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory [the embedded model]")
    parser.add_argument("--devices", nargs="+", default=["0", "1"], help="of the engines")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["D", "P"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads' lengths, for small models")
    parser.add_argument("--open", type=int, default=1024, help="requests kept open for each engine")
    parser.add_argument("--workers", type=int, default=8, help="client processes")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=15.0, help="seconds before: all rows have to be running")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--server-arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to the server")
    options = parser.parse_args(arguments)
    if len(options.devices) < 2:
        parser.error("--devices: at least two are compared with one")
    return options


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    rows = run(options)
    show(rows)
    if not options.no_results:
        append("several_engines", rows)
    print(json.dumps({"rows": rows}))
    if not rows[-1]["only_its_own_failed"] or rows[-1]["restart_s"] is None:
        sys.exit(1)


if __name__ == "__main__":
    main()
