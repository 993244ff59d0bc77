"""Measures an engine's start: from a fresh process to its first token, weights on the local disk.

    python -m benchmarks.startup [--models block-1.2B] [--directory DIR] [--repeats 3] [--cached]

Writes the model with random weights to a directory (below DIR; deleted at the end), and starts processes that load it
and answer one request (benchmarks/startup_child.py): one with an empty Triton cache, then some with what that one has
left there, of which the median counts. Before each, the weights are dropped from the system's file cache, so that they
come from the disk; --cached leaves them there. Appends its rows to benchmarks/results/startup.jsonl and ends with one
JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.harness import add_engine_arguments
from benchmarks.model_files import write_model
from benchmarks.models import MODELS, BenchmarkModel
from benchmarks.results import append, provenance
from benchmarks.startup_child import Start
from engine.process_config import EngineOptions

ROOT = Path(__file__).parent.parent


def drop_from_file_cache(directory: Path) -> None:
    """Have the system forget the weights, so that the next reader waits for the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start_once(directory: Path, options: EngineOptions, triton_cache: Path) -> dict[str, Any]:
    """Seconds to the first token of a fresh process, and what they were spent on. Raises RuntimeError if it fails."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(triton_cache)}
    command = [sys.executable, "-m", "benchmarks.startup_child", str(directory), msgspec.json.encode(options).decode()]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the engine did not start:\n{done.stderr}")
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=Start)
    parts = {"imports": found.imported - started, **found.parts}
    return {
        "device": found.device,
        "seconds_to_first_token": round(found.first_token - started, 3),
        "parts": {name: round(seconds, 3) for name, seconds in parts.items()},
        "kv_bytes": found.kv_bytes,
    }


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the empty Triton cache, and one for the warm one."""
    options = EngineOptions(
        device=arguments.device,
        dtype=arguments.dtype,
        max_rows=arguments.rows or model.rows,
        max_step_positions=arguments.max_step_positions,
        overlapped=False if arguments.sync else None,
        cuda_graphs=False if arguments.no_graphs else None,
    )
    starts = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        directory, triton_cache = Path(folder) / "model", Path(folder) / "triton"
        directory.mkdir()
        triton_cache.mkdir()
        write_model(model, directory, arguments.dtype, device=arguments.device)
        size = (directory / "model.safetensors").stat().st_size
        for _ in range(1 + arguments.repeats):
            if not arguments.cached:
                drop_from_file_cache(directory)
            starts.append(start_once(directory, options, triton_cache))
    empty, *warm = starts
    median = sorted(warm, key=lambda found: found["seconds_to_first_token"])[len(warm) // 2]
    return [
        {
            "bench": "startup",
            "model": model.name,
            "dtype": arguments.dtype,
            "devices": 1,
            "rows": options.max_rows,
            "triton_cache": name,
            "weights_bytes": size,
            "weights_in_file_cache": arguments.cached,
            **found,
            **provenance(),
        }
        for name, found in (("empty", empty), ("warm", median))
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    first = rows[0]
    table = Table(title=f"start to first token on {first['device']}, {first['dtype']}, commit {first['commit']}")
    for column in ("model", "Triton cache", "seconds", *first["parts"]):
        table.add_column(column, justify="left" if column in ("model", "Triton cache") else "right")
    for row in rows:
        parts = (f"{row['parts'].get(name, 0.0):.2f}" for name in first["parts"])
        table.add_row(row["model"], row["triton_cache"], f"{row['seconds_to_first_token']:.2f}", *parts)
    Console(width=130).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, ["block-1.2B"], workloads=())
    parser.add_argument("--directory", type=Path, default=None, help="on a local disk (default: the temporary one)")
    parser.add_argument("--repeats", type=int, default=3, help="starts with a warm Triton cache")
    parser.add_argument("--cached", action="store_true", help="leave the weights in the system's file cache")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure_model(MODELS[name], arguments)
    show(rows)
    if not arguments.no_results:
        append("startup", rows)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
