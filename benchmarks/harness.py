"""What the benchmarks of the engine core share: command line, a core with random weights, a run of it."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.device_waits import counted_waits
from benchmarks.models import MODELS, WORKLOADS, BenchmarkModel, Workload
from engine.config import DTYPES, EngineConfig
from engine.core import EngineCore
from engine.device import on_device
from engine.model.build import build_model
from engine.options import resolve_options
from engine.page_pool import PagePool
from engine.process_config import EngineOptions
from engine.types import GenerationRequest, SamplingParams
from engine.weights import random_weights
from kernels.dispatch import select_kernels

WEIGHTS_SEED = 0
SAMPLING = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=1),
    "top": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
}
"""Ways to choose tokens."""
WARM_UP_STEPS = 4
"""Full steps of prefill before a workload is timed."""

_ids = count()


def next_request_id() -> int:
    """One that no request had."""
    return next(_ids)


@dataclass(frozen=True)
class Run:
    """One timed run of a workload."""

    seconds: float
    tokens: int
    rows: int
    """Largest batch reached."""
    steps: int
    preemptions: int
    host_seconds: float
    """Time in the core's calls outside waiting for the device. On the CPU this includes computing."""


def make_requests(
    workload: Workload, number: int, vocab_size: int, seed: int = 0, sampling: str = "greedy"
) -> list[GenerationRequest]:
    """Random prompts, with answers that end at their length only. `sampling` is one of SAMPLING."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(1, vocab_size, (number, workload.prompt_tokens))
    return [
        GenerationRequest.of(
            request_id=next_request_id(),
            prompt_token_ids=tuple(prompt.tolist()),
            params=replace(SAMPLING[sampling], max_tokens=workload.answer_tokens, seed=place, ignore_eos=True),
        )
        for place, prompt in enumerate(prompts)
    ]


def run_requests(core: EngineCore, requests: Sequence[GenerationRequest]) -> Run:
    """Submit all requests at once and step until all are answered. Raises RuntimeError if an answer is cut short."""
    return collect_answers(core, requests, ())[0]


def collect_answers(
    core: EngineCore, requests: Sequence[GenerationRequest], wanted: Sequence[GenerationRequest]
) -> tuple[Run, list[list[int]]]:
    """As `run_requests`, with the answers of the requests `wanted`."""
    answers: dict[int, list[int]] = {request.request_id: [] for request in wanted}
    tokens, rows, steps = 0, 0, 0
    preemptions = core.preemptions
    in_core = 0.0
    with counted_waits() as waits:
        started = time.perf_counter()
        core.add([(request.request_id, request) for request in requests])
        while core.has_work:
            called = time.perf_counter()
            report = core.step()
            in_core += time.perf_counter() - called
            if report is None:
                continue
            tokens += report.deltas.tokens
            rows = max(rows, report.rows)
            steps += 1
            if answers:
                for _, delta in report.deltas:
                    if delta.request_id in answers:
                        answers[delta.request_id] += delta.token_ids
        seconds = time.perf_counter() - started
    expected = sum(request.params.max_tokens for request in requests)
    if tokens != expected:
        raise RuntimeError(f"{tokens} tokens came and not {expected}: an answer ended early")
    run = Run(seconds, tokens, rows, steps, core.preemptions - preemptions, in_core - waits.seconds)
    return run, list(answers.values())


@contextmanager
def loaded_core(
    model: BenchmarkModel,
    config: EngineConfig,
    *,
    make_pool: Callable[[int], PagePool] = PagePool,
    change: Callable[[dict[str, Tensor]], object] | None = None,
) -> Iterator[EngineCore]:
    """An engine core with random weights, which `change` may alter in place."""
    device = torch.device(config.device)
    free_device(device)
    kernels = select_kernels(device)
    with on_device(device):
        tensors = random_weights(model.config, getattr(torch, config.dtype), device, WEIGHTS_SEED, drawn_on=device)
        if change is not None:
            change(tensors)
        built = build_model(model.config, tensors, kernels)
        # Most of them are held a second time, transposed: the memory is the KV cache's.
        del tensors
    core = EngineCore(name=model.name, config=config, model=built, kernels=kernels, make_pool=make_pool)
    # As the engine process does: what start-up made need not be looked at by the garbage collector again.
    gc.freeze()
    try:
        yield core
    finally:
        gc.unfreeze()


def free_device(device: torch.device) -> None:
    """Give back what a core before has left: it counts as taken until then."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm_up(core: EngineCore, config: EngineConfig, model: BenchmarkModel, workload: Workload) -> None:
    """A few full steps of the workload's prompts, with answers of two blocks."""
    length = model.config.block_length
    number = max(1, WARM_UP_STEPS * config.max_step_positions * length // workload.prompt_tokens)
    short = Workload(workload.name, workload.prompt_tokens, answer_tokens=2 * length)
    run_requests(core, make_requests(short, min(number, config.max_rows), model.config.vocab_size))


def engine_config(model: BenchmarkModel, arguments: argparse.Namespace, max_waiting: int) -> EngineConfig:
    """The engine's settings as an operator would get them, but for what the command line says."""
    options = EngineOptions(
        device=arguments.device,
        dtype=arguments.dtype,
        max_rows=arguments.rows or model.rows,
        max_waiting=max_waiting,
        max_step_positions=arguments.max_step_positions,
        overlapped=False if arguments.sync else None,
        cuda_graphs=False if arguments.no_graphs else None,
    )
    return resolve_options(options, model.config)


def add_engine_arguments(
    parser: argparse.ArgumentParser, models: Sequence[str] = tuple(MODELS), workloads: Sequence[str] = tuple(WORKLOADS)
) -> None:
    """What `engine_config` reads, which models and workloads run, and whether results are kept."""
    parser.add_argument("--models", nargs="+", default=list(models), choices=MODELS, metavar="MODEL")
    if workloads:
        parser.add_argument("--workloads", nargs="+", default=list(workloads), choices=WORKLOADS, metavar="P|D|X")
    parser.add_argument("--rows", type=int, default=None, help="rows of the batch (default: the floor's)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--sync", action="store_true", help="commit each step before the next is planned")
    parser.add_argument("--no-graphs", action="store_true", help="launch the kernels of a step one by one")
    parser.add_argument("--max-step-positions", type=int, default=None, help="default: the engine's own")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")


def describe(core: EngineCore, config: EngineConfig) -> dict[str, object]:
    """What every row says of the engine that was measured."""
    on_device = config.device != "cpu"
    return {
        "model": core.info.model,
        "dtype": config.dtype,
        "device": core.info.device,
        "devices": 1,
        "max_step_positions": config.max_step_positions,
        "overlapped": config.overlapped,
        "cuda_graphs": on_device and config.cuda_graphs,
    }
