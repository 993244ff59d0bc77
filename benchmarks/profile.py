"""Where the time of decode steps goes: the torch profiler's kernels, added up by what they do."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from engine.core import EngineCore
from engine.types import GenerationRequest

PROFILE_STEP_POSITIONS = 1 << 16
"""A large budget: prompts are done with before answers end. What a decode step does does not depend on it."""
PROFILE_ANSWER_TOKENS = 1024
"""Answers are at least this long, so that every row decodes before the first one ends."""
PROFILED_STEPS = 16
STEADY_STEPS = 4
"""Steps without a change of load after which the batch counts as steady."""

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("decode attention", ("_attend_split", "_combine_splits")),
    ("prefill attention", ("_attend_tile",)),
    ("local attention", ("_attend_pairs", "scaled_dot_product", "softmax")),
    ("sampler", ("sample_groups", "sample_row", "sample_vocabulary", "argmax", "topk", "aten::max")),
    ("norms", ("_norm_row", "layer_norm")),
    ("rotary and cache writes", ("_write_paged", "index_put")),
    ("embedding", ("_embed_tile", "embedding")),
    (
        "matrix products",
        (
            "gemm",
            "gemv",
            "nvjet",
            "cutlass",
            "xmma",
            "splitk",
            "cublas",
            "_skinny",
            "aten::mm",
            "addmm",
            "bmm",
            "linear",
        ),
    ),
    ("gelu", ("gelu",)),
    ("copies", ("memcpy", "memset", "copy", "aten::cat", "catarray")),
)
"""Groups and what the names of their kernels or, on the CPU, operators contain; the first that fits counts."""
OTHER = "other"


@dataclass(frozen=True)
class Profile:
    """Microseconds by group, and those of the whole span in which nothing ran."""

    steps: int
    groups: dict[str, float]
    others: dict[str, float]
    """The names in the group "other"."""
    gaps: float
    span: float


def profile_decode(core: EngineCore, requests: list[GenerationRequest], device: torch.device) -> Profile:
    """Bring all requests to decoding, profile PROFILED_STEPS steps, print the table and drop the requests.

    Raises RuntimeError where answers are too short for the batch to become steady.
    """
    core.add([(request.request_id, request) for request in requests])
    _step_until_steady(core)
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    rows = 0
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            report = core.step()
            rows = report.rows if report is not None else rows
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for request in requests:
        core.abort(request.request_id)
    while core.has_work:
        core.step()
    result = _summarise(profiler, device)
    _show(result, f"{core.info.model}, {rows} rows, prompts of {len(requests[0].prompt_token_ids)} tokens")
    return result


def group_of(name: str) -> str:
    """The group of a kernel or operator."""
    lowered = name.lower()
    return next((group for group, parts in GROUPS if any(part in lowered for part in parts)), OTHER)


def busy_time(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def _step_until_steady(core: EngineCore) -> None:
    unchanged, before = 0, None
    while unchanged < STEADY_STEPS:
        if not core.has_work:
            raise RuntimeError("the answers ended before every row was decoding: take fewer rows or a larger budget")
        core.step()
        load = (core.load_now.running, core.load_now.waiting)
        unchanged = unchanged + 1 if load == before else 0
        before = load


def _summarise(profiler: profile, device: torch.device) -> Profile:
    groups: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    spans: list[tuple[float, float]] = []
    for event in profiler.events() or ():
        if event.device_type.name.lower() != device.type:
            continue
        # Operators of the CPU call one another; kernels do not.
        spent = event.self_cpu_time_total if device.type == "cpu" else event.time_range.elapsed_us()
        group = group_of(event.name)
        groups[group] += spent
        if group == OTHER:
            others[event.name] += spent
        spans.append((event.time_range.start, event.time_range.end))
    span = max((end for _, end in spans), default=0.0) - min((start for start, _ in spans), default=0.0)
    return Profile(PROFILED_STEPS, dict(groups), dict(others), span - busy_time(spans), span)


def _show(result: Profile, title: str) -> None:
    table = Table("what", "ms a step", "share", title=f"{title}, {result.steps} decode steps")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, microseconds: float) -> None:
        table.add_row(name, f"{microseconds / result.steps / 1e3:.3f}", f"{microseconds / result.span:.1%}")

    for name, microseconds in sorted(result.groups.items(), key=lambda item: -item[1]):
        add(name, microseconds)
        if name == OTHER:
            for kernel, part in sorted(result.others.items(), key=lambda item: -item[1])[:6]:
                add(f"  {kernel[:70]}", part)
    add("gaps: nothing runs", result.gaps)
    add("in all", result.span)
    Console(width=120).print(table)
