"""Measures a whole server over HTTP with different numbers of API processes, streamed and not.

    python -m benchmarks.front_end_scale --model DIR [--api-processes 1 4 8] [--open 1024] [--device cuda]
        [--server-arguments --random-weights 1 --max-rows 1024]

Starts `blockserve serve` for each number, loads it as `blockserve bench --with-ceiling` does, and appends the rows to
benchmarks/results/front_end_scale.jsonl. A row near the client's own ceiling is marked client-bound.
Answers have different lengths, or all would end at once, and a window would count one batch too many or too few. What
the engine does alone is measured by `benchmarks.engine`: run both on the same machine.
"""

import argparse
import asyncio
import json
from typing import Any

from benchmarks.results import append, provenance
from benchmarks.server import served
from server.bench.command import measure_all
from server.bench.options import add_arguments, read_options
from server.bench.report import show_table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: of this process)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory [the embedded model]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--api-processes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--open", type=int, default=1024, help="requests kept open")
    parser.add_argument("--prompt-tokens", default="128", help="as for `blockserve bench`")
    parser.add_argument("--output-tokens", default="1024-3072", help="as for `blockserve bench`")
    parser.add_argument("--workers", type=int, default=8, help="client processes")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds before: all rows have to be running")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--server-arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to the server")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, api_processes: int) -> list[dict[str, Any]]:
    """Rows of one server: whole answers, and streams."""
    extra = ["--api-processes", str(api_processes), "--max-waiting", str(1 << 20), *options.server_arguments]
    bench = argparse.ArgumentParser()
    add_arguments(bench)
    rows = []
    with served(options.model, options.device, extra) as server:
        for way in (["--no-stream"], []):
            flags = ["--url", server.url, "--concurrency", str(options.open), "--with-ceiling", *way]
            flags += ["--prompt-tokens", options.prompt_tokens, "--output-tokens", options.output_tokens]
            flags += ["--workers", str(options.workers), "--seconds", str(options.seconds)]
            flags += ["--warm-up", str(options.warm_up)]
            about = {
                "bench": "front_end_scale",
                "api_processes": api_processes,
                "device": options.device,
                **provenance(),
            }
            rows += [{**row, **about} for row in asyncio.run(measure_all(read_options(bench.parse_args(flags))))]
    return rows


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    rows: list[dict[str, Any]] = []
    for api_processes in options.api_processes:
        measured = measure(options, api_processes)
        for row in measured:
            print(f"{api_processes} API processes")
            show_table([row])
        rows += measured
    if not options.no_results:
        append("front_end_scale", rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
