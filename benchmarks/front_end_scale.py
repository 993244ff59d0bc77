"""Measures a whole server over HTTP with different numbers of API processes, streamed and not, beside its engine alone.

    python -m benchmarks.front_end_scale --models block-1.2B --tokenizer tokenizer.json --device cuda
        [--api-processes 1 4 8] [--open 1024] [--server-arguments --max-rows 1024]

First come what the clients could do at most, against servers that compute nothing, and what the engine does without
processes and HTTP (`benchmarks.engine`, D). Then `blockserve serve` is started for each number and loaded as
`blockserve bench` does. The rows go to benchmarks/results/front_end_scale.jsonl; one near the clients' own ceiling is
marked client-bound. Models are shapes of `benchmarks.models` with random weights, or that of --model DIR alone, without
the engine's own figure.
Answers have different lengths, or all would end at once, and a window would count one batch too many or too few.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.model_files import write_model
from benchmarks.models import MODELS
from benchmarks.results import append, provenance
from benchmarks.server import served
from server.bench.command import CLIENT_BOUND, measure_all
from server.bench.options import add_arguments, read_options
from server.bench.report import show_table

WAYS = {"whole": ["--no-stream"], "streamed": []}
CEILING = ["--ceiling", "--seconds", "5", "--warm-up", "2"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: of this process)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--models", nargs="+", choices=MODELS, default=[], help="shapes, with random weights")
    what.add_argument("--model", help="model directory [the embedded model]")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for --models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--api-processes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--open", type=int, default=1024, help="requests kept open")
    parser.add_argument("--prompt-tokens", default="128", help="as for `blockserve bench`")
    parser.add_argument("--output-tokens", default="1024-3072", help="as for `blockserve bench`")
    parser.add_argument("--workers", type=int, default=8, help="client processes")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--warm-up", type=float, default=15.0, help="seconds before: all rows have to be running")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--server-arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to the server")
    options = parser.parse_args(arguments)
    if options.models and options.tokenizer is None:
        parser.error("--models: the shapes have no tokenizer: give one with --tokenizer")
    return options


def engine_alone(name: str, rows: int, device: str) -> float:
    """Tokens a second of the engine core in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine", "--quick", "--models", name, "--workloads", "D"]
    flags = ["--rows", str(rows), "--device", device, "--no-results"]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=True)
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    return float(row["tok_s"])


def bench(options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """The row of one `blockserve bench` with the open requests and client processes of `options`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    common = ["--concurrency", str(options.open), "--workers", str(options.workers)]
    (row,) = asyncio.run(measure_all(read_options(parser.parse_args([*common, *flags]))))
    return row


def lengths(options: argparse.Namespace) -> list[str]:
    """The flags for prompts and answers."""
    return ["--prompt-tokens", options.prompt_tokens, "--output-tokens", options.output_tokens]


def measure(options: argparse.Namespace, model: str | None, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each number of API processes and each way."""
    window = ["--seconds", str(options.seconds), "--warm-up", str(options.warm_up), *lengths(options)]
    for api_processes in options.api_processes:
        arguments = ["--api-processes", str(api_processes), "--max-waiting", str(1 << 20)]
        with served(model, options.device, [*arguments, *options.server_arguments]) as server:
            for way, flags in WAYS.items():
                row = bench(options, "--url", server.url, *window, *flags)
                bound = row["tok_s"] >= CLIENT_BOUND * ceilings[way]
                row |= {"ceiling_tok_s": ceilings[way], "client_bound": bound}
                yield row | {"bench": "front_end_scale", "api_processes": api_processes, "device": options.device}


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    ceilings = {way: bench(options, *CEILING, *lengths(options), *flags)["tok_s"] for way, flags in WAYS.items()}
    rows: list[dict[str, Any]] = []
    for name in options.models or [None]:
        if name is None:
            measured = list(measure(options, options.model, ceilings))
        else:
            alone = engine_alone(name, options.open, options.device)
            print(f"{name}: the engine alone gives {alone:,.0f} tok/s")
            with tempfile.TemporaryDirectory() as directory:
                path, tokenizer = Path(directory), options.tokenizer
                write_model(MODELS[name], path, "bfloat16", device=options.device, tokenizer=tokenizer)
                measured = [
                    row | {"shape": name, "engine_tok_s": alone, "engine_share": row["tok_s"] / alone}
                    for row in measure(options, directory, ceilings)
                ]
        for row in measured:
            share = f", {row['engine_share']:.0%} of the engine alone" if "engine_share" in row else ""
            print(f"{row['api_processes']} API processes{share}")
            show_table([row])
        measured = [row | provenance() for row in measured]
        if not options.no_results:
            append("front_end_scale", measured)
        rows += measured
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
