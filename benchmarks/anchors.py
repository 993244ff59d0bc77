"""What others reach, and the comparison of each Block Transformer with the vanilla transformer of equal quality."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.models import CONTROLS

VLLM: Mapping[str, Mapping[str, int]] = {
    "vanilla-302M": {"P": 9_502, "D": 26_083, "X": 3_804},
    "vanilla-85M": {"P": 19_323, "D": 35_559, "X": 10_019},
    "vanilla-19M": {"P": 27_111, "D": 46_903, "X": 27_378},
}
"""Tokens a second of vLLM 0.20.2 with the vanilla models on one H200 in bfloat16: FlashAttention 3, CUDA graphs,
asynchronous scheduling, 1024 requests (vanilla-19M 2048), of X 300 / 400 / 800."""

VLLM_SINGLE: Mapping[str, tuple[int, float]] = {
    "vanilla-302M": (684, 10.8),
    "vanilla-85M": (872, 5.2),
    "vanilla-19M": (682, 4.2),
}
"""Of the same, one request alone: tokens a second of 128 in and 512 out; milliseconds to the first token of 2048 in."""


def vllm_single(model: str) -> tuple[int, float] | tuple[None, None]:
    """VLLM_SINGLE of a vanilla model, or of the one that a block model is paired with."""
    return VLLM_SINGLE.get(CONTROLS.get(model, model), (None, None))


def vllm_row(model: str, workload: str) -> int | None:
    """vLLM's tokens a second with a vanilla model, or with the one that a block model is paired with."""
    return VLLM.get(CONTROLS.get(model, model), {}).get(workload)


def pairs_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Both ratios of each pair and workload: to our own vanilla model and to vLLM's. None where no pair was run."""
    measured = {(row["model"], row["workload"]): row["tok_s"] for row in rows}
    table = Table(title="Block Transformers and vanilla transformers of equal quality, tok/s")
    for column in ("block model", "vanilla model", "workload"):
        table.add_column(column)
    for column in ("block", "vanilla", "ratio", "vanilla in vLLM, H200", "ratio"):
        table.add_column(column, justify="right")
    for (model, workload), block in measured.items():
        vanilla = measured.get((CONTROLS.get(model, ""), workload))
        if vanilla is None:
            continue
        vllm = vllm_row(model, workload)
        theirs = ("n/a", "n/a") if vllm is None else (f"{vllm:,}", f"{block / vllm:.2f}x")
        table.add_row(
            model, CONTROLS[model], workload, f"{block:,.0f}", f"{vanilla:,.0f}", f"{block / vanilla:.2f}x", *theirs
        )
    return table if table.rows else None
