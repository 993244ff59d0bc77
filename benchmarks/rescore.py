"""Rescores answers of a full bfloat16 batch with the plain model in float32: how good is each chosen token.

    python -m benchmarks.rescore [--models block-1.2B ...] [--workloads D] [--requests N]

Runs a full batch, greedy, as benchmarks.engine does, and takes 64 answers spread over it. The model written down
plainly (engine/model/naive.py), with the same weights in float32, computes the logits of all their tokens by teacher
forcing. Of 99.9% of the tokens the logit has to be within 0.6 of the largest one: what bfloat16 rounds away may decide
between near equals, and nothing else. Appends a row for each cell to benchmarks/results/rescore.jsonl, ends with one
JSON line, and exits with 1 where a cell falls short.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import (
    WEIGHTS_SEED,
    add_engine_arguments,
    collect_answers,
    describe,
    engine_config,
    free_device,
    loaded_core,
    make_requests,
)
from benchmarks.models import MODELS, WORKLOADS, BenchmarkModel
from benchmarks.results import append, provenance
from engine.alignment import align_prompt
from engine.model.naive import NaiveModel, naive_model
from engine.weights import random_weights

RESCORED = 64
ALLOWED_GAP = 0.6
REQUIRED_SHARE = 0.999
BLOCKS_AT_ONCE = 256
"""Logits of so many blocks are computed at once: of four tokens, 0.2 GB."""

Asked = tuple[Sequence[int], Sequence[int]]
"""A prompt's tokens and those of its answer."""


def spread(number: int, wanted: int) -> list[int]:
    """`wanted` places, or all, evenly spread over `number`."""
    return sorted({round(place) for place in np.linspace(0, number - 1, min(number, wanted))})


@torch.inference_mode()
def gaps(oracle: NaiveModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """How far below the largest logit that of each of the answer's tokens is, [tokens] float32, on the host."""
    config = oracle.config
    length = config.block_length
    aligned = align_prompt(prompt, length, config.prompt_alignment, config.pad_token_id)
    first = aligned.blocks.size + len(aligned.forced)
    tokens = [*aligned.blocks.ravel().tolist(), *aligned.forced, *answer]
    end = len(tokens)
    # What fills the last block stands behind all that is scored.
    tokens += [0] * (-end % length)
    blocks = torch.tensor(tokens, device=oracle.device).view(-1, length)
    contexts = oracle.contexts(oracle.embed(blocks[None]))[0]
    start = first // length
    found = []
    for begin in range(start, len(blocks), BLOCKS_AT_ONCE):
        part = blocks[begin : begin + BLOCKS_AT_ONCE]
        # A context conditions the block behind it.
        logits = oracle.block_logits(contexts[begin - 1 : begin - 1 + len(part)], part)
        chosen = logits.gather(-1, part[..., None])[..., 0]
        found.append((logits.amax(-1) - chosen).flatten())
    return torch.cat(found)[first - start * length : end - start * length].cpu()


def measure_model(model: BenchmarkModel, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each workload."""
    number = arguments.requests or arguments.rows or model.rows
    config = engine_config(model, arguments, max_waiting=max(number, arguments.rows or model.rows))
    cells = []
    with loaded_core(model, config) as core:
        common = describe(core, config)
        for name in arguments.workloads:
            requests = make_requests(WORKLOADS[name], number, model.config.vocab_size, seed=1)
            taken = [requests[place] for place in spread(number, RESCORED)]
            run, answers = collect_answers(core, requests, taken)
            prompts = [request.prompt_token_ids for request in taken]
            cells.append((name, run, list(zip(prompts, answers, strict=True))))
    del core
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    free_device(device)
    tensors = random_weights(model.config, dtype, device, WEIGHTS_SEED, drawn_on=device)
    oracle = naive_model(model.config, tensors, torch.float32, device)
    del tensors
    for name, run, asked in cells:
        yield {
            "bench": "rescore",
            **common,
            "workload": name,
            "requests": number,
            "rows": run.rows,
            "preemptions": run.preemptions,
            **rescore(oracle, asked),
            **provenance(),
        }


def rescore(oracle: NaiveModel, asked: Sequence[Asked]) -> dict[str, Any]:
    """What the oracle finds about the answers."""
    found = torch.cat([gaps(oracle, prompt, answer) for prompt, answer in asked])
    return {
        "rescored": len(asked),
        "tokens": len(found),
        "within": float((found <= ALLOWED_GAP).double().mean()),
        "best": float((found == 0).double().mean()),
        "largest_gap": float(found.max()),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    first = rows[0]
    table = Table(title=f"{first['dtype']} answers in float32 logits, {first['device']}, commit {first['commit']}")
    for column in ("model", "workload", "rows", "answers", "tokens", f"within {ALLOWED_GAP}", "the best", "worst gap"):
        table.add_column(column, justify="left" if column in ("model", "workload") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            row["workload"],
            str(row["rows"]),
            str(row["rescored"]),
            f"{row['tokens']:,}",
            f"{row['within']:.4%}" + ("" if row["within"] >= REQUIRED_SHARE else " !"),
            f"{row['best']:.2%}",
            f"{row['largest_gap']:.3f}",
        )
    Console(width=130).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.set_defaults(workloads=["D"])
    parser.add_argument("--requests", type=int, default=None, help="default: one full batch")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep, judge."""
    arguments = parse()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for row in measure_model(MODELS[name], arguments):
            rows.append(row)
            if not arguments.no_results:
                append("rescore", [row])
    show(rows)
    print(json.dumps({"rows": rows}))
    if any(row["within"] < REQUIRED_SHARE for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
