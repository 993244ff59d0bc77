"""The naive model computes what the reference computed."""

import pytest
import torch

from engine.config import BlockTransformerConfig
from engine.model.naive import NaiveBlockTransformer, NaiveModel, naive_model
from engine.types import SamplingParams
from tests.golden.cases import (
    BLOCK_VARIANTS,
    COMPARABLE,
    DIRECTORY,
    FORWARD_CASES,
    VARIANTS,
    assert_embeddings,
    assert_logits,
    config,
    forward_case,
    generations,
    weights,
)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def naive(variant: str) -> NaiveModel:
    return naive_model(config(variant), weights(variant))


@pytest.mark.parametrize(("variant", "name"), FORWARD_CASES)
def test_forward(naive: NaiveModel, variant: str, name: str) -> None:
    case = forward_case(variant, name)
    result = naive.forward(case["input_ids"], case["attention_mask"])
    valid, real = case["valid"].bool(), case["block_attention_mask"].bool()
    assert valid.any()
    assert_logits(result.logits[valid], case["logits"][valid])
    for role in ("block_embeddings", "context_embeddings"):
        if role in case:
            assert_embeddings(getattr(result, role)[real], case[role][real])


def test_forward_in_double_precision_is_the_same_function(variant: str) -> None:
    case = forward_case(variant, "full")
    result = naive_model(config(variant), weights(variant), torch.float64).forward(case["input_ids"])
    assert result.logits.dtype == torch.float64
    assert_logits(result.logits.float(), case["logits"])


@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_expanded_context(variant: str) -> None:
    naive = NaiveBlockTransformer(BlockTransformerConfig.load(DIRECTORY / variant), weights(variant))
    case = forward_case(variant, "full")
    expanded = naive.expand(case["context_embeddings"].flatten(0, 1))
    assert_embeddings(expanded, case["expanded_context"].flatten(0, 1))


def test_generate_batch_reproduces_every_generation(naive: NaiveModel, variant: str) -> None:
    compared = 0
    for case in generations(variant):
        answers = naive.generate_batch(case.prompt, case.mask, case.max_length, stop_at_eos=case.stops_at_eos)
        for row, answer in enumerate(answers):
            expected = case.expected(row)
            ended = case.stops_at_eos and expected[-1] == 0
            assert answer[: len(expected)] == expected, (case.name, row)
            assert len(answer) == (len(expected) if ended else case.max_length - case.prompt.shape[1]), (case.name, row)
            assert len(answer) - len(expected) < config(variant).block_length
            compared += 1
    assert compared >= COMPARABLE[variant]


def test_generate_reproduces_every_single_run(naive: NaiveModel, variant: str) -> None:
    compared = stopped = 0
    for case in generations(variant):
        for row in case.comparable_rows:
            prompt, expected = case.row_prompt(row), case.expected(row)
            params = SamplingParams(temperature=0, max_tokens=len(expected), ignore_eos=not case.stops_at_eos)
            answer = naive.generate(prompt, params)
            assert answer.token_ids == expected, (case.name, row)
            assert min(answer.margins) > 0.015, (case.name, row)
            ended = case.stops_at_eos and expected[-1] == 0
            assert (answer.finish_reason, answer.stop_reason) == ("stop" if ended else "length", None)
            compared += 1
            stopped += ended
    assert compared >= COMPARABLE[variant]
    assert stopped >= 5


def test_step_logits_and_contexts(naive: NaiveModel, variant: str) -> None:
    length = config(variant).block_length
    compared = 0
    for case in generations(variant):
        if case.step_logits is None:
            continue
        prompt = case.row_prompt(0)
        padded = [0] * (-len(prompt) % length) + prompt
        blocks = len(padded) // length
        steps = len(case.step_logits)
        generated = case.output[0, len(prompt) :].tolist()[:steps]
        generated += [0] * (-len(generated) % length)
        ids = torch.tensor([padded + generated]).view(1, -1, length)
        result = naive.forward(ids)
        assert_logits(result.logits[0, blocks - 1 :].flatten(0, 1)[:steps], case.step_logits)
        if case.context_embeddings is not None:
            contexts = result.context_embeddings[0, blocks - 1 : blocks - 1 + len(case.context_embeddings)]
            assert_embeddings(contexts, case.context_embeddings)
        compared += 1
    assert compared >= 4


def test_forced_tail_equals_teacher_forcing_at_every_cut(naive: NaiveModel, variant: str) -> None:
    case = forward_case(variant, "full")
    ids, logits = case["input_ids"], case["logits"]
    length = config(variant).block_length
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for row in range(len(ids)):
        flat = ids[row].flatten().tolist()
        for cut in range(length, len(flat)):
            block, place = divmod(cut, length)
            expected = logits[row, block - 1, place]
            answer = naive.generate(flat[:cut], params, alignment="forced_tail")
            best = expected.topk(2).values
            assert answer.token_ids == [int(expected.argmax())]
            assert answer.margins[0] == pytest.approx(float(best[0] - best[1]), abs=2e-4)
