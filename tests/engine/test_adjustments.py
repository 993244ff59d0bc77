"""Slots of rows that ask for bias or penalties; what they are told of logprobs; and what others pay for it."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.adjustments import FIRST_SLOTS, Adjustments
from engine.core import EngineCore
from engine.decode_step import DecodeStep
from engine.runner import Runner
from engine.staging import Staging
from engine.types import MAX_LOGPROBS, Delta, GenerationRequest, SamplingParams
from kernels.adjust import IN_PROMPT
from kernels.logprobs import MAX_TOP
from tests.engine.helpers import DEVICES, GoldenModel
from tests.engine.scheduling import make_sequence

MODEL = GoldenModel("lookup_prefix2")
PLAIN = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, seed=0)


def request(request_id: int, params: SamplingParams = PLAIN) -> GenerationRequest:
    return GenerationRequest.of(request_id=request_id, prompt_token_ids=range(5, 25 + request_id), params=params)


def run(core: EngineCore, requests: list[GenerationRequest]) -> dict[int, list[Delta]]:
    core.add([(one.request_id, one) for one in requests])
    deltas: dict[int, list[Delta]] = {one.request_id: [] for one in requests}
    while core.has_work:
        report = core.step()
        for _, delta in report.deltas if report else ():
            deltas[delta.request_id].append(delta)
    return deltas


def test_kernels_and_requests_agree_on_the_most_logprobs() -> None:
    assert MAX_TOP == MAX_LOGPROBS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"logit_bias": ((7, 100.0),)},
    ],
)
def test_each_alone_changes_greedy_answers_as_the_oracle_says(change: dict[str, object], device: str) -> None:
    params = msgspec.structs.replace(PLAIN, max_tokens=30, **change)
    one = request(0, params)
    expected = MODEL.oracle(one).token_ids
    assert expected != MODEL.oracle(request(0, msgspec.structs.replace(PLAIN, max_tokens=30))).token_ids
    assert [token for delta in run(MODEL.core(device=device), [one])[0] for token in delta.token_ids] == expected


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
def test_a_repetition_penalty_beyond_single_precision_is_as_strong_as_can_be(penalty: float) -> None:
    one = request(0, msgspec.structs.replace(PLAIN, repetition_penalty=penalty))
    (last,) = run(MODEL.core(), [one])[0][-1:]
    assert last.finish_reason == "length"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [5e-324, 1.4e-45, 1e-30, 2.0])
@pytest.mark.parametrize("penalty", [5e-324, 1.0, 1.7e308])
def test_the_ends_of_every_range_together_give_an_answer(temperature: float, penalty: float, device: str) -> None:
    least = 5e-324
    extremes: list[dict[str, Any]] = [
        {"top_p": 0.4},
        {"top_p": least, "min_p": least},
        {"top_k": 3, "min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0, "logit_bias": ((1, 100.0), (2, -100.0))},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "logprobs": 20},
    ]
    common: dict[str, Any] = {"temperature": temperature, "repetition_penalty": penalty}
    requests = [
        request(number, msgspec.structs.replace(PLAIN, **common, **change)) for number, change in enumerate(extremes)
    ]
    for deltas in run(MODEL.core(device=device), requests).values():
        assert deltas[-1].finish_reason == "length", deltas[-1].error
        assert sum(len(delta.token_ids) for delta in deltas) == PLAIN.max_tokens


def test_steps_are_adjusted_only_where_a_row_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[bool] = []
    original = DecodeStep.run

    def recording(step: DecodeStep, row_index: torch.Tensor, *, adjusted: bool = False) -> object:
        kinds.append(adjusted)
        return original(step, row_index, adjusted=adjusted)

    monkeypatch.setattr(DecodeStep, "run", recording)
    core = MODEL.core(max_rows=4)
    asking = msgspec.structs.replace(PLAIN, max_tokens=4, logprobs=0)
    deltas = run(core, [request(0), request(1, asking), request(2)])
    assert kinds == [True, False, False]
    assert [len(delta.logprobs) for delta in deltas[1]] == [4]
    assert not any(delta.logprobs for delta in deltas[0])
    assert [token for delta in deltas[0] for token in delta.token_ids] == MODEL.oracle(request(0)).token_ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlapped", [False, True])
def test_slots_grow_with_the_rows_that_ask_and_are_used_again(overlapped: bool, device: str) -> None:
    core = MODEL.core(device=device, overlapped=overlapped, max_rows=40, max_step_positions=4096)
    tables = core._runner._tables.adjustments
    assert len(tables.tables.counts) == 1, "who never asks pays for a table"
    asking = msgspec.structs.replace(PLAIN, presence_penalty=0.5)
    for number, slots in ((1, FIRST_SLOTS), (FIRST_SLOTS, FIRST_SLOTS), (33, 4 * FIRST_SLOTS), (2, 4 * FIRST_SLOTS)):
        requests = [request(one, asking) for one in range(number)]
        deltas = run(core, requests)
        assert len(tables.tables.counts) == slots + 1
        for one in requests[:: max(1, number // 4)]:
            tokens = [token for delta in deltas[one.request_id] for token in delta.token_ids]
            assert tokens == MODEL.oracle(one).token_ids


def test_counts_are_those_of_prompt_and_answer() -> None:
    adjustments = Adjustments(rows=3, vocab_size=20, staging=Staging(torch.device("cpu")))
    params = SamplingParams(frequency_penalty=1.0, logit_bias=((3, 1.5),))
    one = make_sequence(0, [5, 6, 6, 7], params=params)
    one.row = 1
    assert adjustments.make_room([one])
    adjustments.bind([one])
    slot = int(adjustments.tables.slot[1])
    assert slot > 0
    wanted = np.zeros(20, np.int32)
    wanted[[5, 6, 7]] = IN_PROMPT
    assert adjustments.tables.counts[slot].tolist() == wanted.tolist()
    # The first of the block's tokens was forced.
    row_index, tokens = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([[5, 6, 9, 9], [1, 1, 1, 1]])
    entries = adjustments.entries(row_index, tokens, torch.tensor([1, 0]))
    adjustments.count(entries)
    wanted[[6, 9]] += np.array([1, 2], np.int32)
    assert adjustments.tables.counts[slot].tolist() == wanted.tolist()
    assert adjustments.tables.counts[0].eq(0).all()


def test_who_finds_no_memory_for_a_slot_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(runner: Runner, bound: object) -> bool:
        raise torch.OutOfMemoryError("no memory for slots")

    core = MODEL.core(max_rows=4)
    monkeypatch.setattr(Runner, "_make_room", no_memory)
    asking = msgspec.structs.replace(PLAIN, presence_penalty=0.5)
    deltas = run(core, [request(0), request(1, asking)])
    assert deltas[1][-1].finish_reason == "error"
    assert [token for delta in deltas[0] for token in delta.token_ids] == MODEL.oracle(request(0)).token_ids
