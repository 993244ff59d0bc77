"""The engine core: requests in, deltas out, one step at a time. Driven by the engine process and by the offline API."""

import logging
import math
import time
from collections.abc import Callable, Collection, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.alignment import align_prompt
from engine.batch_tables import BatchTables
from engine.config import EngineConfig, ModelConfig
from engine.decode_graphs import DecodeGraphs
from engine.decode_step import DecodeStep
from engine.deltas import StepDeltas
from engine.device import device_name, on_device
from engine.graph_pool import GraphPool
from engine.kv_cache import KVCache, KVLayout, free_memory, plan_pages
from engine.meter import EngineTotals
from engine.model.build import build_model
from engine.model.model import Model
from engine.page_pool import PagePool
from engine.prefill_graphs import PrefillGraphs
from engine.prefill_step import PrefillStep
from engine.prefix_cache import PrefixCache
from engine.rehearsal import activation_bytes
from engine.runner import Runner, StepGraphs, StepInFlight
from engine.scheduler import QueueFullError, Scheduler
from engine.score_layout import lay_out_text, longest_text
from engine.scorer import ScoredText, Scorer
from engine.sequence import Sequence, SequenceState
from engine.staging import Staging
from engine.step_budget import StepBudget
from engine.step_plan import StepPlan
from engine.types import (
    MAX_STOP_TOKEN_IDS,
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationRequest,
    InvalidRequestError,
    ScoreRequest,
)
from engine.validation import (
    unpack_prompt,
    validate_cache_salt,
    validate_padding,
    validate_priority,
    validate_request,
    validate_score,
)
from engine.weights import expected_shapes, load_weights, random_weights
from kernels.dispatch import Kernels, select_kernels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What a committed step did, and the call's cost."""

    deltas: StepDeltas
    rows: int
    """Rows that decoded."""
    seconds: float
    scored: list[tuple[Hashable, Delta]]
    """Texts that are scored, or cannot be, by key."""


class EngineCore:
    """One model on one device, with its scheduler and caches. Not thread-safe: one caller, one step at a time."""

    def __init__(
        self,
        *,
        name: str,
        config: EngineConfig,
        model: Model,
        kernels: Kernels,
        clock: Callable[[], float] = time.monotonic,
        make_pool: Callable[[int], PagePool] = PagePool,
    ) -> None:
        """Allocates the caches. Raises ConfigError if not one request of maximum length fits.

        `make_pool` gets the number of pages; a benchmark hands them out in another order.
        """
        self._clock = clock
        self._config = config
        self._model_config = model.config
        device, dtype = torch.device(config.device), getattr(torch, config.dtype)
        layout = KVLayout.of(model.config.block_decoder, config.page_size, dtype)
        build = partial(_runner, config, model, kernels)
        self._on_device = on_device(device)
        with self._on_device:
            activations = activation_bytes(build, layout, config)
            pages = plan_pages(layout, model.config, config, free_memory(device), activations)
            cache = KVCache.allocate(layout, pages, device)
            self._runner = build(cache)
            self._runner.capture_graphs()
            self._scorer = Scorer(model, kernels, layout, config)
        self._pool = make_pool(cache.pages)
        self._prefix_cache = PrefixCache(self._pool, config.page_size, enabled=config.prefix_cache)
        self._scheduler = Scheduler(
            pool=self._pool,
            max_rows=config.max_rows,
            max_waiting=config.max_waiting,
            page_size=config.page_size,
            budget=StepBudget.of(
                config.max_step_positions,
                model.config.block_decoder.hidden_size,
                model.config.block_decoder.intermediate_size,
            ),
            block_length=model.config.block_length,
            eos_token_id=model.config.eos_token_id,
            prefix_cache=self._prefix_cache,
        )
        self._in_flight: tuple[StepPlan, StepInFlight] | None = None
        self._no_deltas = StepDeltas([], np.empty((0, model.config.block_length), np.int32))
        self.step_underway: StepPlan | None = None
        """The step that `step` worked on last, and works on as long as it has not returned."""
        self.info = EngineInfo(
            model=name,
            vocab_size=model.config.vocab_size,
            block_length=model.config.block_length,
            max_length=model.config.max_length,
            eos_token_id=model.config.eos_token_id,
            device=device_name(device),
            dtype=config.dtype,
            max_rows=config.max_rows,
            pages=cache.pages,
            page_size=config.page_size,
            kv_bytes=(cache.pages + 1) * layout.page_bytes,
            parameters=sum(math.prod(shape) for shape in expected_shapes(model.config).values()),
        )

    @classmethod
    def load(cls, name: str, directory: Path, config: EngineConfig, random_seed: int | None = None) -> "EngineCore":
        """The model of a directory, with its weights or, for benchmarks, random ones. Raises ConfigError."""
        model_config = ModelConfig.load(directory)
        device, dtype = torch.device(config.device), getattr(torch, config.dtype)
        with on_device(device):
            if random_seed is None:
                tensors = load_weights(directory, model_config, dtype, device)
            else:
                tensors = random_weights(model_config, dtype, device, random_seed)
            kernels = select_kernels(device)
            model = build_model(model_config, tensors, kernels)
            # Most of them are held a second time, transposed: the memory is the KV cache's.
            del tensors
        return cls(name=name, config=config, model=model, kernels=kernels)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._scorer.has_work

    @property
    def load_now(self) -> EngineLoad:
        """How busy the engine is."""
        waiting = self._scheduler.waiting + self._scorer.waiting
        return EngineLoad(running=self._scheduler.running, waiting=waiting, pages_used=self._pool.used)

    @property
    def preemptions(self) -> int:
        """Requests that lost their row and were queued again, in all."""
        return self._scheduler.preemptions

    @property
    def totals(self) -> EngineTotals:
        """What was counted since the engine was made."""
        cache = self._prefix_cache
        return EngineTotals(self.preemptions, cache.queried_tokens, cache.hit_tokens)

    @property
    def step_in_flight(self) -> bool:
        """Whether a step was launched that is not committed yet. Never between the calls of a synchronous engine."""
        return self._in_flight is not None

    def add(
        self, group: Seq[tuple[Hashable, GenerationRequest]], scores: Seq[tuple[Hashable, ScoreRequest]] = ()
    ) -> None:
        """Take all requests of the group, and texts to score, each under its key, or none.

        Raises InvalidRequestError (checked again here, whatever the front end did) or QueueFullError.
        """
        now = self._clock()
        sequences = [self._sequence(key, request, now) for key, request in group]
        texts = [self._text(key, request) for key, request in scores]
        if texts and self._scorer.waiting + len(texts) > self._config.max_waiting:
            most = self._config.max_waiting
            raise QueueFullError(f"{self._scorer.waiting} texts wait to be scored, and at most {most} may")
        self._scheduler.add(sequences)
        self._scorer.add(texts)

    def abort(self, key: Hashable) -> bool:
        """Forget a request at any moment; False if it is not known (any more)."""
        return self._scheduler.abort(key) or self._scorer.abort(key)

    def state_of(self, key: Hashable) -> SequenceState | None:
        """Where an unfinished request is; None if it is not known (any more)."""
        return self._scheduler.state_of(key)

    def step(self) -> StepReport | None:
        """Launch the next step and commit one, and likewise score a chunk; None if nothing came of either.

        Synchronous, a step is committed by the call that launched it. Overlapped, it is committed by the next call,
        which launches its successor first: the host plans and commits while the device computes.
        """
        with self._on_device:
            return self._step()

    def _step(self) -> StepReport | None:
        started = self._clock()
        plan = self.step_underway = self._scheduler.schedule(started)
        launched = None if plan is None else (plan, self._runner.launch(plan, self._given_up()))
        if self._config.overlapped:
            launched, self._in_flight = self._in_flight, launched
        scored = self._scorer.step()
        if launched is None:
            return StepReport(self._no_deltas, 0, self._clock() - started, scored) if scored else None
        plan, step = launched
        self.step_underway = plan
        result = step.wait()
        now = self._clock()
        deltas = self._scheduler.commit(
            plan, result.tokens, result.finite, now, failed=result.failed, logprobs=result.logprobs
        )
        return StepReport(deltas, len(plan.decode), now - started, scored)

    def check_integrity(self) -> None:
        """AssertionError if rows, pages or states do not add up."""
        self._scheduler.check_integrity()

    def _given_up(self) -> Collection[Sequence]:
        """Sequences that the scheduler will learn of at the next commit: they have failed."""
        return () if self._in_flight is None else self._in_flight[1].failed

    def _text(self, key: Hashable, request: ScoreRequest) -> ScoredText:
        model = self._model_config
        token_ids = unpack_prompt(request.text)
        validate_padding(request.padding, model.block_length)
        longest = longest_text(model, request.padding)
        validate_score(token_ids, request.top, vocab_size=model.vocab_size, max_length=longest)
        return ScoredText(key, request, lay_out_text(token_ids, model, request.padding), len(token_ids))

    def _sequence(self, key: Hashable, request: GenerationRequest, now: float) -> Sequence:
        model = self._model_config
        validate_priority(request.priority)
        validate_cache_salt(request.cache_salt)
        token_ids = unpack_prompt(request.prompt)
        validate_request(token_ids, request.params, vocab_size=model.vocab_size, max_length=model.max_length)
        if request.params.seed is None:
            raise InvalidRequestError("seed", "seed is missing: whoever submits a request to an engine draws one")
        prompt = align_prompt(token_ids, model.block_length, model.prompt_alignment, model.pad_token_id)
        return Sequence(key=key, request=request, prompt=prompt, arrival=now, block_length=model.block_length)


def _runner(config: EngineConfig, model: Model, kernels: Kernels, cache: KVCache) -> Runner:
    device = torch.device(config.device)
    staging = Staging(device)
    tables = BatchTables(
        max_rows=config.max_rows,
        max_pages=-(-model.config.max_positions // config.page_size),
        block_length=model.config.block_length,
        eos_token_id=model.config.eos_token_id,
        max_suppressed=MAX_STOP_TOKEN_IDS + 1,
        vocab_size=model.config.vocab_size,
        staging=staging,
    )
    prefill = PrefillStep(model, cache, tables)
    decode = DecodeStep(model, kernels, cache, tables, config.max_rows)
    graphs = None
    if (pool := graph_pool(config)) is not None:
        graphs = StepGraphs(
            PrefillGraphs(prefill, tables, staging, pool, config.max_step_positions),
            DecodeGraphs(decode, tables, staging, pool, config.max_rows),
        )
    return Runner(prefill=prefill, decode=decode, graphs=graphs, tables=tables, staging=staging)


def graph_pool(config: EngineConfig) -> GraphPool | None:
    """Where steps are captured; None if their operations are to be launched one by one."""
    return GraphPool() if torch.device(config.device).type == "cuda" and config.cuda_graphs else None
