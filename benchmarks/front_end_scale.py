"""Measures a whole server over HTTP with different numbers of API processes, streamed and not, beside its engine alone.

    python -m benchmarks.front_end_scale --models block-1.2B --tokenizer tokenizer.json --device cuda
        [--api-processes 1 4 8] [--open 1024] [--server-arguments --max-rows 1024]

First come what the clients could do at most, against servers that compute nothing, and what the engine does without
processes and HTTP (`benchmarks.engine`, D). Then `blockserve serve` is started for each number and loaded as
`blockserve bench` does. Each throughput is the client's, and beside it `server_tok_s`, that of the server's own counter
in the same seconds, which the engine's share is of. Under the last number the time to first token of the idle server is
measured too. The rows go to benchmarks/results/front_end_scale.jsonl; one near the clients' own ceiling is marked
client-bound. Models are shapes of `benchmarks.models` with random weights, or that of --model DIR alone, without the
engine's own figure.
Answers have different lengths, or all would end at once, and all new prompts would be read at once.
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

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import free_device
from benchmarks.model_files import write_model
from benchmarks.models import MODELS
from benchmarks.results import append, provenance
from benchmarks.server import FIRST_TOKENS, Served, counted, first_token, served
from engine.device import device_name
from server.bench.command import CLIENT_BOUND, measure_all
from server.bench.options import add_arguments, read_options

WAYS = {"whole": ["--no-stream"], "streamed": []}
LATENCIES = {"ttft_ms": "TTFT p50/p99", "itl_ms": "ITL p50/p99", "e2e_ms": "E2E p50/p99"}
"""In milliseconds."""
TTFT_PROMPT = 2048
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
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds before: all rows have to be running")
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


def counted_bench(options: argparse.Namespace, server: Served, *flags: str) -> dict[str, Any]:
    """The row of one `blockserve bench`, with `server_tok_s`: the same seconds by the server's own counter."""
    with counted(server) as count:
        row = bench(options, "--url", server.url, *flags)
    return row | {"server_tok_s": round(count.tokens_per_second(row["measured_from"], row["seconds"]), 1)}


def idle_figures(server: Served) -> dict[str, Any]:
    """The time to first token of a server that does nothing else, of a prompt of TTFT_PROMPT tokens if it takes one."""
    prompt_tokens = min(TTFT_PROMPT, server.config.max_length - FIRST_TOKENS)
    seconds = asyncio.run(first_token(server, prompt_tokens))
    return {"idle_ttft_ms": round(seconds * 1e3, 2), "idle_prompt_tokens": prompt_tokens}


def measure(options: argparse.Namespace, model: str | None, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each number of API processes and each way; those of the last number have the idle server's figures."""
    window = ["--seconds", str(options.seconds), "--warm-up", str(options.warm_up), *lengths(options)]
    common = {"bench": "front_end_scale", "device": device_name(torch.device(options.device))}
    for api_processes in options.api_processes:
        arguments = ["--api-processes", str(api_processes), "--max-waiting", str(1 << 20)]
        with served(model, options.device, [*arguments, *options.server_arguments]) as server:
            idle = idle_figures(server) if api_processes == options.api_processes[-1] else {}
            for way, flags in WAYS.items():
                row = counted_bench(options, server, *window, *flags)
                bound = row["tok_s"] >= CLIENT_BOUND * ceilings[way]
                row |= {"ceiling_tok_s": ceilings[way], "client_bound": bound}
                yield row | {**common, "api_processes": api_processes, **idle}


def measure_shape(options: argparse.Namespace, name: str, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The rows of a shape with random weights, beside its engine alone."""
    alone = engine_alone(name, options.open, options.device)
    print(f"{name}: the engine alone gives {alone:,.0f} tok/s", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        write_model(MODELS[name], Path(directory), "bfloat16", device=options.device, tokenizer=options.tokenizer)
        # The memory that the weights were drawn in is the server's.
        free_device(torch.device(options.device))
        for row in measure(options, directory, ceilings):
            yield row | {"shape": name, "engine_tok_s": alone, "engine_share": row["server_tok_s"] / alone}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of all rows: throughput as client and server have it, its bounds, and latencies."""
    table = Table(title=f"front end, {rows[0]['load']}, {rows[0]['device']}, commit {rows[0]['commit']}")
    columns = ["model", "processes", "answers", "failed", "client's tok/s", "server's", "of the engine"]
    for column in (*columns, "client's ceiling", *LATENCIES.values()):
        table.add_column(column, justify="right")
    for row in rows:
        name, way = row.get("shape", row["model"]), "streamed" if row["streamed"] else "whole"
        share = f"{row['engine_share']:.0%}" if "engine_share" in row else "-"
        ceiling = f"{row['ceiling_tok_s']:,.0f}{' client-bound' if row['client_bound'] else ''}"
        rates = (f"{row[figure]:,.0f}" for figure in ("tok_s", "server_tok_s"))
        spreads = (row[figure] for figure in LATENCIES)
        latencies = (f"{spread['p50']:.4g}/{spread['p99']:.4g}" if spread else "-" for spread in spreads)
        table.add_row(name, str(row["api_processes"]), way, str(row["failures"]), *rates, share, ceiling, *latencies)
    Console(width=170).print(table)
    idle = {row.get("shape", row["model"]): row for row in rows if "idle_ttft_ms" in row}
    for name, row in idle.items():
        figures = f"{row['idle_ttft_ms']} ms to the first token of {row['idle_prompt_tokens']} prompt tokens"
        print(f"{name}, idle, {row['api_processes']} API processes: {figures}")


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    ceilings = {way: bench(options, *CEILING, *lengths(options), *flags)["tok_s"] for way, flags in WAYS.items()}
    rows: list[dict[str, Any]] = []
    for name in options.models or [None]:
        measured = measure(options, options.model, ceilings) if name is None else measure_shape(options, name, ceilings)
        # Kept one by one: what was measured outlives a server that fails.
        for row in measured:
            rows.append(row | provenance())
            way = "streamed" if row["streamed"] else "whole"
            print(f"{row['api_processes']} API processes, {way}: {row['server_tok_s']:,.0f} tok/s", flush=True)
            if not options.no_results:
                append("front_end_scale", rows[-1:])
    show(rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
