"""Where the time of steps goes: the torch profiler's kernels, added up by what they do."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.device_waits import counted_waits
from benchmarks.models import Workload
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import GenerationRequest

KINDS = ("decode", "prefill")
PROFILE_STEP_POSITIONS = 1 << 16
"""A large budget: prompts are done with before answers end. What a decode step does does not depend on it."""
PROFILED_STEPS = 16
"""Steps that are profiled, and as many before them that are timed without the profiler."""
STEADY_STEPS = 4
"""Steps without a change of load after which the batch counts as steady; of prefill, steps that come before."""
SPARE_STEPS = 8
"""More steps than are expected to be needed."""

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("decode attention", ("_attend_split", "_combine_splits")),
    ("prefill attention", ("_attend_tile",)),
    ("local attention", ("_attend_and_gelu", "scaled_dot_product", "softmax")),
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
NECESSARY = ("matrix products", "decode attention", "prefill attention")
"""What the floor consists of: products, and the attention that reads the KV cache."""


@dataclass(frozen=True)
class Profile:
    """Microseconds by group, and those of the whole span in which nothing ran."""

    steps: int
    groups: dict[str, float]
    others: dict[str, float]
    """The names in the group "other"."""
    gaps: float
    span: float

    @property
    def necessary_share(self) -> float:
        """Share of matrix products and reading of the KV cache in the time of all kernels."""
        return sum(self.groups.get(name, 0.0) for name in NECESSARY) / sum(self.groups.values())


@dataclass(frozen=True)
class Pace:
    """Seconds a step takes without the profiler, and how many of them the host works."""

    step: float
    host: float


def decode_workload(workload: Workload, block_length: int, config: EngineConfig) -> Workload:
    """The middle of a workload's answers: prompts that reach there, and answers that last until all is measured."""
    prompt = (workload.prompt_tokens + workload.answer_tokens // 2) // block_length
    prefill_steps = -(-config.max_rows * prompt // (config.max_step_positions - config.max_rows))
    steps = prefill_steps + STEADY_STEPS + 2 * PROFILED_STEPS + SPARE_STEPS
    return Workload(workload.name, prompt * block_length, steps * block_length)


def prefill_workload(workload: Workload, block_length: int) -> Workload:
    """A workload's prompts, whose rows leave with their first block: every step prefills as much as it may."""
    return Workload(workload.name, workload.prompt_tokens, block_length)


def prefill_number(workload: Workload, block_length: int, config: EngineConfig) -> int:
    """Prompts that fill all steps which `profile_steps` takes."""
    steps = STEADY_STEPS + 2 * PROFILED_STEPS + SPARE_STEPS
    return -(-steps * config.max_step_positions * block_length // workload.prompt_tokens)


def profile_steps(
    core: EngineCore, requests: list[GenerationRequest], device: torch.device, kind: str = "decode"
) -> Profile:
    """Time steps, profile as many, print the table and drop the requests.

    `kind` is one of KINDS: "decode" brings all requests to decoding first. Raises RuntimeError where the answers are
    too short for the batch to become steady, or where the requests end before the profile.
    """
    core.add([(request.request_id, request) for request in requests])
    if kind == "decode":
        _step_until_steady(core)
    else:
        _run_steps(core, STEADY_STEPS)
    with counted_waits() as waits:
        started = time.perf_counter()
        _run_steps(core, PROFILED_STEPS)
        seconds = time.perf_counter() - started
    pace = Pace(seconds / PROFILED_STEPS, (seconds - waits.seconds) / PROFILED_STEPS)
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        rows = _run_steps(core, PROFILED_STEPS)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for request in requests:
        core.abort(request.request_id)
    while core.has_work:
        core.step()
    result = _summarise(profiler, device)
    prompt_tokens = len(requests[0].prompt_token_ids)
    _show(result, pace, f"{core.info.model}, prompts of {prompt_tokens} tokens, {rows} rows decode, {kind}")
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


def _run_steps(core: EngineCore, number: int) -> int:
    """Take so many steps. Returns the rows that decoded in the last."""
    rows = 0
    for _ in range(number):
        if not core.has_work:
            raise RuntimeError("all answers ended before the steps that are measured: take more or longer requests")
        report = core.step()
        rows = rows if report is None else report.rows
    return rows


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


def _show(result: Profile, pace: Pace, title: str) -> None:
    table = Table("what", "ms a step", "share", title=f"{title}, {result.steps} steps")
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
    table.add_section()
    table.add_row("products and reading KV, of the kernels' time", "", f"{result.necessary_share:.1%}")
    table.add_row("a step without the profiler", f"{pace.step * 1e3:.3f}", "")
    table.add_row("  of which the host works", f"{pace.host * 1e3:.3f}", f"{pace.host / pace.step:.1%}")
    Console(width=120).print(table)
