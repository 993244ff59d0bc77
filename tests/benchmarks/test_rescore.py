"""Rescoring through the real code: what it finds about good answers and about bad ones."""

import argparse

import pytest
import torch

from benchmarks.models import WORKLOADS, BenchmarkModel, Workload
from benchmarks.rescore import gaps, measure_model, parse, rescore, show, spread
from engine.config import ModelConfig
from engine.model.naive import NaiveModel, naive_model
from engine.types import SamplingParams
from engine.weights import random_weights
from tests.benchmarks.tiny import MODEL, TINY, VANILLA

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(WORKLOADS, "D", Workload("D", prompt_tokens=9, answer_tokens=21))
    return parse(["--device", "cpu", "--dtype", "float32", "--max-step-positions", "32", "--requests", "6"])


@pytest.fixture
def oracle() -> NaiveModel:
    return make_oracle(TINY)


def make_oracle(config: ModelConfig) -> NaiveModel:
    return naive_model(config, random_weights(config, torch.float32, torch.device("cpu"), seed=0))


@pytest.mark.parametrize(
    "config",
    [TINY, TINY.model_copy(update={"prompt_alignment": "forced_tail"}), VANILLA.config],
    ids=["left_pad", "forced_tail", "vanilla"],
)
def test_the_oracles_own_answer_has_no_gap(config: ModelConfig) -> None:
    oracle = make_oracle(config)
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    answer = oracle.generate(PROMPT, params).token_ids
    found = gaps(oracle, PROMPT, answer)
    assert found.shape == (30,)
    assert float(found.max()) < 1e-4


def test_blocks_in_parts_are_the_same(oracle: NaiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [7 * place % 64 for place in range(23)]
    whole = gaps(oracle, PROMPT, answer)
    monkeypatch.setattr("benchmarks.rescore.BLOCKS_AT_ONCE", 2)
    torch.testing.assert_close(gaps(oracle, PROMPT, answer), whole)


def test_bad_tokens_are_found(oracle: NaiveModel) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    answer = oracle.generate(PROMPT, params).token_ids
    logits_worst = min(range(64), key=lambda token: -float(gaps(oracle, PROMPT, [*answer[:11], token])[-1]))
    figures = rescore(oracle, [(PROMPT, answer), (PROMPT, [*answer[:11], logits_worst])])
    assert figures["tokens"] == 24
    assert figures["best"] == pytest.approx(23 / 24)
    assert figures["largest_gap"] == float(gaps(oracle, PROMPT, [*answer[:11], logits_worst])[-1])


@pytest.mark.parametrize("model", [MODEL, VANILLA], ids=["block", "vanilla"])
def test_answers_of_the_engine_are_within_the_gap(
    model: BenchmarkModel, arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = measure_model(model, arguments)
    assert (row["bench"], row["model"], row["requests"], row["rescored"], row["tokens"]) == (
        "rescore", model.name, 6, 6, 6 * 21,
    )  # fmt: skip
    assert row["within"] == 1
    assert row["largest_gap"] < 1e-3
    show([row])
    assert "100.0000%" in capsys.readouterr().out


def test_requests_are_taken_from_all_over() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 64) == [0, 1, 2]
