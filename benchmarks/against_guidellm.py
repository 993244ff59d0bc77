"""Measures the same load with `blockserve bench` and with guidellm, and compares what they say.

    python -m venv /elsewhere && /elsewhere/bin/pip install guidellm 'torch<2.14'
    python -m benchmarks.against_guidellm --guidellm /elsewhere/bin/guidellm [--device cpu] [--open 8] [--runs 3]

Closed loops of equal lengths, in turn, against a canned server whose times are known and against `blockserve serve`.
The medians of all runs are compared; appends the rows to benchmarks/results/against_guidellm.jsonl and ends with one
JSON line. The server has half of the cores and the clients the others: guidellm takes more of them than we do, and a
server that has to share is slower before it. guidellm needs an environment of its own, and is started outside of this
repository, whose packages its libraries would otherwise import.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import append, provenance
from benchmarks.server import served
from engine.model_files import find_model
from server.bench.command import canned_servers, first_model, measure
from server.bench.options import add_arguments, read_options

FIGURES = {
    # ours: (guidellm's, a unit of its in ours)
    "requests_s": ("requests_per_second", 1.0),
    "tok_s": ("output_tokens_per_second", 1.0),
    "ttft_ms": ("time_to_first_token_ms", 1.0),
    # The time from the first token to the last by the tokens but one has another name there.
    "tpot_ms": ("inter_token_latency_ms", 1.0),
    "e2e_ms": ("request_latency", 1e3),
}
PACE_S = 0.02


def by_guidellm(options: argparse.Namespace, url: str, model: str) -> dict[str, float]:
    """Means of the successful requests. Raises RuntimeError if one failed, CalledProcessError if guidellm did."""
    with tempfile.TemporaryDirectory() as directory:
        # Beside config.json its library would look for a model that it knows.
        for path in find_model(options.model).glob("tokenizer*.json"):
            shutil.copy(path, directory)
        out = Path(directory) / "report.json"
        command = [options.guidellm, "run", "--disable-console", "--output", f"kind=json,path={out}"]
        command += ["--backend", f"kind=openai_http,target={url},model={model},request_format=/v1/completions"]
        command[-1] += ",validate_backend=false"
        command += ["--tokenizer", f"kind=huggingface_auto,model={directory}"]
        lengths = f"prompt_tokens={options.prompt_tokens},output_tokens={options.output_tokens}"
        command += ["--data", f"kind=synthetic_text,{lengths}", "--profile", f"kind=concurrent,streams={options.open}"]
        command += ["--constraint", f"kind=max_requests,count={options.requests}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads(out.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    if metrics["request_totals"]["successful"] < options.requests:
        raise RuntimeError(f"requests: {metrics['request_totals']}")
    return {ours: metrics[name]["successful"]["mean"] * unit for ours, (name, unit) in FIGURES.items()}


def by_ourselves(options: argparse.Namespace, url: str, model: str) -> dict[str, float]:
    """The same of `blockserve bench`. Raises RuntimeError if a request failed."""
    bench = argparse.ArgumentParser()
    add_arguments(bench)
    flags = ["--url", url, "--model", model, "--concurrency", str(options.open), "--requests", str(options.requests)]
    flags += ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
    # guidellm names no temperature, which means 1, and sampling takes the server longer than choosing the best.
    plan = read_options(bench.parse_args([*flags, "--workers", "1", "--temperature", "1"]))
    row = asyncio.run(measure(plan, plan.loads[0], [plan.address], "blockserve bench"))
    if row["failures"]:
        raise RuntimeError(f"requests: {row['errors']}")
    return {name: row[name]["mean"] if isinstance(row[name], dict) else row[name] for name in FIGURES}


def compare(options: argparse.Namespace, url: str, model: str, server: str) -> dict[str, Any]:
    """A row: the medians of both, and by how much ours differ."""
    ours, theirs = [], []
    for _ in range(options.runs):
        ours.append(by_ourselves(options, url, model))
        theirs.append(by_guidellm(options, url, model))
    row: dict[str, Any] = {
        "bench": "against_guidellm",
        "server": server,
        "open_requests": options.open,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "requests": options.requests,
        "runs": options.runs,
    }
    for name in FIGURES:
        mine, other = (statistics.median(run[name] for run in runs) for runs in (ours, theirs))
        row[name] = {"bench": round(mine, 3), "guidellm": round(other, 3), "difference": round(mine / other - 1, 4)}
    return {**row, **provenance()}


@contextlib.asynccontextmanager
async def paced_server() -> AsyncIterator[str]:
    """The URL of a canned server whose blocks come PACE_S apart."""
    async with canned_servers(1, PACE_S) as (address,):
        yield f"http://{address.host}:{address.port}"


async def compare_canned(options: argparse.Namespace) -> dict[str, Any]:
    """The row of the canned server."""
    async with paced_server() as url:
        return await asyncio.to_thread(compare, options, url, "canned", f"canned, {PACE_S} s a block")


def compare_served(options: argparse.Namespace) -> dict[str, Any]:
    """The row of `blockserve serve`, which has cores of its own if there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, cores[: max(1, len(cores) // 2)])
        stack.callback(os.sched_setaffinity, 0, cores)
        server = stack.enter_context(served(options.model, options.device, options.server_arguments))
        os.sched_setaffinity(0, cores[len(cores) // 2 :])
        bench = argparse.ArgumentParser()
        add_arguments(bench)
        model = asyncio.run(first_model(read_options(bench.parse_args(["--url", server.url]))))
        return compare(options, server.url, model, f"blockserve, {options.device}")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"blockserve bench / guidellm, means, medians of {rows[0]['runs']} runs")
    for column in ("server", *FIGURES):
        table.add_column(column)
    for row in rows:
        cells = (f"{v['bench']:.1f} / {v['guidellm']:.1f} ({v['difference']:+.1%})" for v in map(row.get, FIGURES) if v)
        table.add_row(row["server"], *cells)
    Console(width=160).print(table)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, help="its command")
    parser.add_argument("--servers", choices=("canned", "blockserve"), nargs="+", default=["canned", "blockserve"])
    parser.add_argument("--model", help="model directory [the embedded model]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--open", type=int, default=8, help="requests kept open")
    parser.add_argument("--requests", type=int, default=160, help="of each run")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--server-arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to the server")
    options = parser.parse_args()
    rows = []
    if "canned" in options.servers:
        rows.append(asyncio.run(compare_canned(options)))
    if "blockserve" in options.servers:
        rows.append(compare_served(options))
    show(rows)
    if not options.no_results:
        append("against_guidellm", rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
