"""A request that cannot go on fails alone: what is beside it and after it gets the naive model's tokens."""

import dataclasses
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.decode_graphs import DecodeGraphs
from engine.decode_step import DecodeStep, Written
from engine.model.build import build_model
from engine.prefill_graphs import PrefillGraphs
from engine.scheduler import NON_FINITE_ERROR, OUT_OF_MEMORY_ERROR
from engine.types import Delta, GenerationRequest, InvalidRequestError, SamplingParams, pack_tokens
from engine.weights import random_weights
from kernels.dispatch import Kernels, select_kernels, torch_kernels
from kernels.sampler import SamplingTables
from tests.engine.helpers import MAX_POSITIONS, GoldenModel, golden_tensors

MODEL = GoldenModel("lookup_prefix2")
BLOCK_LENGTH = MODEL.config.block_length
overlapped_or_not = pytest.mark.parametrize("overlapped", [False, True], ids=["synchronous", "overlapped"])


class SmallDevice:
    """Kernels of a device whose memory does not suffice for products of more than `rows` rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.failures = 0

    @property
    def kernels(self) -> Kernels:
        """The torch twins, but for the products."""
        whole = torch_kernels()

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if x.shape[0] > self.rows:
                self.failures += 1
                raise torch.OutOfMemoryError(f"tried to allocate a product of {x.shape[0]} rows")
            return whole.linear(x, weight, bias)

        return dataclasses.replace(whole, linear=linear)


def request(request_id: int, blocks: int = 3, max_tokens: int = 24, first_token: int = 20) -> GenerationRequest:
    """A prompt of `blocks` blocks, greedy or sampled by its id."""
    first = first_token + 31 * request_id
    return GenerationRequest.of(
        request_id=request_id,
        prompt_token_ids=tuple(first + place for place in range(blocks * BLOCK_LENGTH)),
        params=SamplingParams(max_tokens=max_tokens, temperature=request_id % 2, seed=request_id, ignore_eos=True),
    )


def run(core: EngineCore, requests: list[GenerationRequest]) -> dict[int, list[Delta]]:
    """Serve the requests to their end, checking the core's integrity after each step; deltas by request id."""
    deltas: dict[int, list[Delta]] = {item.request_id: [] for item in requests}
    core.add([(item.request_id, item) for item in requests])
    while core.has_work:
        report = core.step()
        core.check_integrity()
        for _, delta in report.deltas if report else ():
            deltas[delta.request_id].append(delta)
    assert core.load_now.running == core.load_now.waiting == core.load_now.pages_used == 0
    return deltas


def tokens_of(deltas: list[Delta]) -> list[int]:
    """All tokens of an answer."""
    return [token for delta in deltas for token in delta.token_ids]


@cache
def oracle(item: GenerationRequest) -> list[int]:
    """The naive model's answer."""
    return list(MODEL.oracle(item).token_ids)


def check_exact(answered: dict[int, list[Delta]], requests: list[GenerationRequest]) -> None:
    """Every request has the oracle's answer."""
    for item in requests:
        assert tokens_of(answered[item.request_id]) == oracle(item)
        assert answered[item.request_id][-1].finish_reason == "length"


def check_failed(deltas: list[Delta], error: str) -> None:
    """One delta, which says so."""
    assert [(delta.token_ids, delta.finish_reason, delta.error) for delta in deltas] == [((), "error", error)]


@overlapped_or_not
def test_a_prompt_that_memory_does_not_suffice_for_fails_alone(
    overlapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device = SmallDevice(rows=10)
    core = MODEL.core(kernels=device.kernels, max_rows=5, overlapped=overlapped)
    long = request(2, blocks=20, first_token=0)
    others = [request(request_id, blocks=5) for request_id in (0, 1, 3, 4)]
    with caplog.at_level(logging.WARNING, logger="engine"):
        answered = run(core, [*others[:2], long, *others[2:]])
    check_failed(answered[2], OUT_OF_MEMORY_ERROR)
    check_exact(answered, others)
    (record,) = caplog.records
    assert vars(record)["requests"] == [2]
    check_exact(run(core, others), others)


@overlapped_or_not
def test_what_has_failed_is_not_tried_again_by_the_step_behind_it(overlapped: bool) -> None:
    device = SmallDevice(rows=8)
    core = MODEL.core(kernels=device.kernels, max_rows=2, max_step_positions=11, overlapped=overlapped)
    check_failed(run(core, [request(2, blocks=25, first_token=0)])[2], OUT_OF_MEMORY_ERROR)
    assert device.failures == 2, "the chunk, and the same again by itself"


@overlapped_or_not
def test_a_batch_that_memory_does_not_suffice_for_is_decoded_in_parts(
    overlapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device = SmallDevice(rows=7)
    core = MODEL.core(kernels=device.kernels, max_rows=12, overlapped=overlapped)
    requests = [request(request_id, max_tokens=20 + request_id) for request_id in range(12)]
    with caplog.at_level(logging.WARNING, logger="engine"):
        check_exact(run(core, requests), requests)
    assert device.failures > 0
    assert [record.args for record in caplog.records] == [(12, 6), (6, 3)], "once each, not in every step"


@overlapped_or_not
def test_rows_that_memory_does_not_suffice_for_one_by_one_fail(overlapped: bool) -> None:
    device = SmallDevice(rows=100)
    core = MODEL.core(kernels=device.kernels, max_rows=3, overlapped=overlapped)
    requests = [request(request_id) for request_id in range(5)]
    check_exact(run(core, requests), requests)
    device.rows = 1
    for deltas in run(core, requests).values():
        check_failed(deltas, OUT_OF_MEMORY_ERROR)
    device.rows = 100
    check_exact(run(core, requests), requests)


def damaged_tensors(token: int) -> dict[str, Tensor]:
    """The weights, but that whatever reads `token` is NaN."""
    tensors = dict(golden_tensors(MODEL.variant))
    embeddings = tensors["embedder.embeddings.weight"].clone()
    embeddings[token] = float("nan")
    return tensors | {"embedder.embeddings.weight": embeddings}


@pytest.mark.parametrize("place", [0, 8 * BLOCK_LENGTH - 1], ids=["prefilled", "decoded"])
@overlapped_or_not
def test_a_request_that_makes_nan_fails_alone(overlapped: bool, place: int) -> None:
    poison = 509
    core = MODEL.core(
        tensors=damaged_tensors(poison), max_rows=3, page_size=8, kv_bytes=7 * MODEL.page_bytes, overlapped=overlapped
    )
    # Shorter than what fails: they decode while the rest of their pages still holds another's NaN.
    good = [request(request_id, blocks=2, max_tokens=28 + 4 * request_id) for request_id in range(6)]
    assert all(poison not in (*item.prompt_token_ids, *oracle(item)) for item in good)
    bad = []
    for request_id in (6, 7, 8):
        item = request(request_id, blocks=8, max_tokens=8)
        prompt = list(item.prompt_token_ids)
        prompt[place] = poison
        bad.append(msgspec.structs.replace(item, prompt=pack_tokens(prompt)))
    answered = run(core, [good[0], bad[0], good[1], bad[1], bad[2], *good[2:]])
    for item in bad:
        check_failed(answered[item.request_id], NON_FINITE_ERROR)
    check_exact(answered, good)


def test_logits_that_a_forced_token_makes_nothing_of_fail_nobody() -> None:
    """`sample` is told a negative place where a token is forced: there it says that the logits are not finite."""
    whole = torch_kernels()

    def sample(
        logits: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables
    ) -> tuple[Tensor, Tensor]:
        tokens, finite = whole.sample(logits, row_index, generated_index, tables)
        return tokens, finite & (generated_index >= 0)

    model = GoldenModel("lookup_prefix2", alignment="forced_tail")
    core = model.core(kernels=dataclasses.replace(whole, sample=sample), max_rows=4)
    requests = [
        GenerationRequest.of(
            request_id=tail,
            prompt_token_ids=tuple(range(9, 9 + 2 * BLOCK_LENGTH + tail)),
            params=SamplingParams(max_tokens=9, temperature=0, seed=0, ignore_eos=True),
        )
        for tail in range(BLOCK_LENGTH)
    ]
    answered = run(core, requests)
    for item in requests:
        assert tokens_of(answered[item.request_id]) == model.oracle(item).token_ids


@overlapped_or_not
def test_more_than_pages_can_hold_is_answered_exactly(overlapped: bool) -> None:
    pages = MAX_POSITIONS // 8
    core = MODEL.core(max_rows=6, page_size=8, kv_bytes=(pages + 1) * MODEL.page_bytes, overlapped=overlapped)
    requests = [request(request_id, blocks=2, max_tokens=26 * BLOCK_LENGTH) for request_id in range(8)]
    check_exact(run(core, requests), requests)
    assert core.preemptions > 0


def test_the_largest_request_fits_the_smallest_pool_and_a_larger_one_is_rejected() -> None:
    core = MODEL.core(max_rows=2, page_size=8, kv_bytes=(MAX_POSITIONS // 8 + 1) * MODEL.page_bytes)
    longest = MAX_POSITIONS * BLOCK_LENGTH
    largest = request(1, blocks=2, max_tokens=longest - 2 * BLOCK_LENGTH)
    check_exact(run(core, [largest]), [largest])
    with pytest.raises(InvalidRequestError) as caught:
        core.add([("key", request(1, blocks=2, max_tokens=longest - 2 * BLOCK_LENGTH + 1))])
    assert caught.value.param == "max_tokens"
    assert not core.has_work


class RunsOutOnce(TorchDispatchMode):
    """Memory runs out at the operation number `at` that makes a new tensor, counted over all that is done inside."""

    def __init__(self, at: int) -> None:
        TorchDispatchMode.__init__(self)
        self.at = at
        self.made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            self.made += 1
            if self.made == self.at:
                raise torch.OutOfMemoryError(f"no memory for what {func} makes")
        return result


@pytest.mark.parametrize("penalty", [0.0, 0.5], ids=["plain", "adjusted"])
def test_a_step_can_be_run_again_wherever_it_ran_out_of_memory(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GoldenModel("lookup_prefix2", "forced_tail")
    requests = [
        GenerationRequest.of(
            request_id=request_id,
            prompt_token_ids=tuple(range(5, 12 + request_id)),
            params=SamplingParams(
                max_tokens=3 * BLOCK_LENGTH, seed=request_id, ignore_eos=True, frequency_penalty=penalty
            ),
        )
        for request_id in range(2)
    ]
    expected = [model.oracle(item).token_ids for item in requests]
    original = DecodeStep.run
    mode = RunsOutOnce(at=0)

    def with_little_memory(step: DecodeStep, row_index: Tensor, *, adjusted: bool) -> Written:
        with mode:
            return original(step, row_index, adjusted=adjusted)

    monkeypatch.setattr(DecodeStep, "run", with_little_memory)
    steps = 0
    core = model.core(max_rows=2)
    core.add([(item.request_id, item) for item in requests])
    while core.has_work:
        steps += core.step() is not None
    of_a_step = mode.made // steps
    bookkeeping = range(of_a_step - 16, of_a_step + 1)
    for at in (*range(1, of_a_step, of_a_step // 16), *bookkeeping):
        mode = RunsOutOnce(at)
        answered = run(model.core(max_rows=2), requests)
        assert mode.made > at
        assert [tokens_of(answered[item.request_id]) for item in requests] == expected, f"ran out at {at}"


@contextmanager
def memory_left(slack_bytes: int) -> Iterator[None]:
    """So much device memory and no more, beyond what is in use."""
    gc.collect()  # a core before this one would give its memory back only in between
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + slack_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def wide_core(**options: object) -> EngineCore:
    """A core on CUDA whose prompts take 64 KiB a position, and whose batch takes 400 KB a row."""
    golden = MODEL.config
    decoder = golden.block_decoder.model_copy(update={"intermediate_size": 8192})
    config = golden.model_copy(update={"vocab_size": 100_000, "max_length": 1 << 15, "block_decoder": decoder})
    device = torch.device("cuda:0")
    kernels = select_kernels(device)
    model = build_model(config, random_weights(config, torch.float32, device, 0), kernels)
    engine = EngineConfig.create(device="cuda:0", max_rows=256, max_step_positions=1 << 14, kv_bytes=1 << 26, **options)
    return EngineCore(name="wide", config=engine, model=model, kernels=kernels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@overlapped_or_not
def test_cuda_out_of_memory(
    overlapped: bool, cuda_graphs: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs that were captured at start need no memory any more.
    for kind in (DecodeGraphs, PrefillGraphs):
        monkeypatch.setattr(kind, "capture_all", lambda graphs: True)
    options = {"overlapped": overlapped, "cuda_graphs": cuda_graphs}
    requests = [request(request_id, max_tokens=8) for request_id in range(256)]
    long = request(1000, blocks=8000, max_tokens=8)
    expected = run(wide_core(**options), [*requests, long])
    assert tokens_of(expected[1000])
    core = wide_core(**options)
    run(core, requests[:1])
    with memory_left(80 << 20), caplog.at_level(logging.WARNING, logger="engine"):
        answered = run(core, [*requests[:9], long, *requests[9:]])
    check_failed(answered.pop(1000), OUT_OF_MEMORY_ERROR)
    for request_id, deltas in answered.items():
        assert tokens_of(deltas) == tokens_of(expected[request_id])
        assert deltas[-1].finish_reason == "length"
    assert [vars(record)["requests"] for record in caplog.records if "requests" in vars(record)] == [[1000]]
    assert any("rows at once" in record.getMessage() for record in caplog.records)
