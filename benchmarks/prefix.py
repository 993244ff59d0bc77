"""Measures requests that share the start of their prompts, with the prefix cache and without.

    python -m benchmarks.prefix [--models block-302M ...] [--requests 1000] [--shared 2000] [--own 16] [--answer 64]

Through the engine core. Random weights and tokens, greedy, EOS ignored; all requests are submitted at once. Every
request but the first has to find all whole pages of the shared tokens; a run in which fewer are found raises
RuntimeError. Appends a row for each run to benchmarks/results/prefix.jsonl and ends with one JSON line.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.harness import (
    Run,
    add_engine_arguments,
    describe,
    engine_config,
    free_device,
    loaded_core,
    make_requests,
    run_requests,
    warm_up,
)
from benchmarks.models import MODELS, BenchmarkModel, Workload
from benchmarks.results import append, provenance
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import GenerationRequest, pack_tokens


def sharing_requests(
    workload: Workload, shared: int, number: int, vocab_size: int, seed: int
) -> list[GenerationRequest]:
    """Requests whose prompts have the first `shared` tokens in common."""
    requests = make_requests(workload, number, vocab_size, seed)
    prefix = requests[0].prompt_token_ids[:shared]
    return [replace(request, prompt=pack_tokens((*prefix, *request.prompt_token_ids[shared:]))) for request in requests]


def least_found(config: EngineConfig, block_length: int, workload: Workload, shared: int, number: int) -> int:
    """Prompt tokens that all requests but the first have to find: those in whole pages that all have in common."""
    padding = -workload.prompt_tokens % block_length
    page_tokens = config.page_size * block_length
    whole = (shared + padding) // page_tokens * page_tokens
    return max(whole - padding, 0) * (number - 1)


def measure(core: EngineCore, requests: list[GenerationRequest]) -> tuple[Run, int, int]:
    """A run, and the prompt tokens it asked for and found."""
    before = core.totals
    run = run_requests(core, requests)
    after = core.totals
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    return run, queries, after.prefix_cache_hits - before.prefix_cache_hits


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row with the cache, and one without."""
    workload = Workload("shared prefix", arguments.shared + arguments.own, arguments.answer)
    plain = engine_config(model, arguments, max_waiting=arguments.requests)
    for prefix_cache in (True, False):
        config = plain.model_copy(update={"prefix_cache": prefix_cache})
        with loaded_core(model, config) as core:
            warm_up(core, config, model, workload)
            vocabulary = model.config.vocab_size
            requests = sharing_requests(workload, arguments.shared, arguments.requests, vocabulary, seed=1)
            run, queries, hits = measure(core, requests)
            expected = least_found(config, model.config.block_length, workload, arguments.shared, len(requests))
            if prefix_cache and hits < expected:
                raise RuntimeError(f"{hits} prompt tokens were found, and {expected} are shared")
            yield {
                "bench": "prefix",
                **describe(core, config),
                "workload": f"{arguments.shared} shared, {arguments.own} own, {arguments.answer} out",
                "prefix_cache": prefix_cache,
                "requests": len(requests),
                "rows": run.rows,
                "queried_tokens": queries,
                "found_tokens": hits,
                "tok_s": run.tokens / run.seconds,
                "seconds": run.seconds,
                "steps": run.steps,
                "preemptions": run.preemptions,
                **provenance(),
            }
        free_device(torch.device(config.device))


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, models=("block-302M",), workloads=())
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--shared", type=int, default=2000, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=16, help="tokens behind them that each prompt has of its own")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    return parser.parse_args(command_line)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table("model", "workload", "cache", "found", "tok/s", "seconds", "steps", "preemptions")
    for row in rows:
        table.add_row(
            row["model"],
            row["workload"],
            "on" if row["prefix_cache"] else "off",
            f"{row['found_tokens']} of {row['queried_tokens']}",
            f"{row['tok_s']:.0f}",
            f"{row['seconds']:.2f}",
            str(row["steps"]),
            str(row["preemptions"]),
        )
    Console().print(table)


def main() -> None:
    """Run the benchmark."""
    arguments = parse()
    rows = [row for name in arguments.models for row in measure_model(MODELS[name], arguments)]
    show(rows)
    if not arguments.no_results:
        append("prefix", rows)
    print(json.dumps({"bench": "prefix", "rows": rows}))


if __name__ == "__main__":
    main()
