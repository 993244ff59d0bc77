"""Rescoring through the real code: what it finds about good answers and about bad ones."""

import argparse

import pytest
import torch

from benchmarks.models import WORKLOADS, Workload
from benchmarks.rescore import gaps, measure_model, parse, rescore, show, spread
from engine.model.naive import NaiveBlockTransformer
from engine.types import SamplingParams
from engine.weights import random_weights
from tests.benchmarks.tiny import MODEL, TINY

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(WORKLOADS, "D", Workload("D", prompt_tokens=9, answer_tokens=21))
    return parse(["--device", "cpu", "--dtype", "float32", "--max-step-positions", "32", "--requests", "6"])


@pytest.fixture
def oracle() -> NaiveBlockTransformer:
    return NaiveBlockTransformer(TINY, random_weights(TINY, torch.float32, torch.device("cpu"), seed=0))


@pytest.mark.parametrize("alignment", ["left_pad", "forced_tail"])
def test_the_oracles_own_answer_has_no_gap(alignment: str) -> None:
    config = TINY.model_copy(update={"prompt_alignment": alignment})
    oracle = NaiveBlockTransformer(config, random_weights(config, torch.float32, torch.device("cpu"), seed=0))
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    answer = oracle.generate(PROMPT, params).token_ids
    found = gaps(oracle, PROMPT, answer)
    assert found.shape == (30,)
    assert float(found.max()) < 1e-4


def test_blocks_in_parts_are_the_same(oracle: NaiveBlockTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [7 * place % 64 for place in range(23)]
    whole = gaps(oracle, PROMPT, answer)
    monkeypatch.setattr("benchmarks.rescore.BLOCKS_AT_ONCE", 2)
    torch.testing.assert_close(gaps(oracle, PROMPT, answer), whole)


def test_bad_tokens_are_found(oracle: NaiveBlockTransformer) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    answer = oracle.generate(PROMPT, params).token_ids
    logits_worst = min(range(64), key=lambda token: -float(gaps(oracle, PROMPT, [*answer[:11], token])[-1]))
    figures = rescore(oracle, [(PROMPT, answer), (PROMPT, [*answer[:11], logits_worst])])
    assert figures["tokens"] == 24
    assert figures["best"] == pytest.approx(23 / 24)
    assert figures["largest_gap"] == float(gaps(oracle, PROMPT, [*answer[:11], logits_worst])[-1])


def test_answers_of_the_engine_are_within_the_gap(
    arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = measure_model(MODEL, arguments)
    assert (row["bench"], row["model"], row["requests"], row["rescored"], row["tokens"]) == (
        "rescore", "tiny", 6, 6, 6 * 21,
    )  # fmt: skip
    assert row["within"] == 1
    assert row["largest_gap"] < 1e-3
    show([row])
    assert "100.0000%" in capsys.readouterr().out


def test_requests_are_taken_from_all_over() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 64) == [0, 1, 2]
