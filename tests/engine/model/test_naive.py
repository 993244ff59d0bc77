"""Where the naive model's answers end and how they sample; what it computes is compared in tests/golden."""

import math

import pytest
import torch

from engine.model.naive import NaiveModel, naive_model
from engine.types import SamplingParams
from tests.golden.cases import config, weights

PROMPT = (491, 38, 152, 8)
GREEDY = (326, 223, 197, 0, 210, 106, 271, 504)
"""How the reference goes on after PROMPT (case noeos_trainpos/P4); 0 is end-of-text."""


@pytest.fixture(scope="module")
def naive() -> NaiveModel:
    return naive_model(config("lookup_prefix2"), weights("lookup_prefix2"))


@pytest.mark.parametrize(
    ("params", "count", "finish", "stop"),
    [
        (SamplingParams(max_tokens=6, ignore_eos=True), 6, "length", None),
        (SamplingParams(max_tokens=1), 1, "length", None),
        (SamplingParams(max_tokens=8), 4, "stop", None),
        (SamplingParams(max_tokens=4), 4, "stop", None),
        (SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(106, 9)), 6, "stop", 106),
        (SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(0,)), 4, "stop", 0),
        (SamplingParams(max_tokens=8, stop_token_ids=(0,)), 4, "stop", None),
        (SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(326,), min_tokens=0), 1, "stop", 326),
    ],
)
def test_endings(naive: NaiveModel, params: SamplingParams, count: int, finish: str, stop: int | None) -> None:
    greedy = SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__} | {"temperature": 0})
    answer = naive.generate(PROMPT, greedy)
    assert answer.token_ids == list(GREEDY[:count])
    assert (answer.finish_reason, answer.stop_reason) == (finish, stop)
    assert len(answer.margins) == count


def test_endings_are_suppressed_among_the_first_min_tokens(naive: NaiveModel) -> None:
    answer = naive.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8, min_tokens=5, stop_token_ids=(223,)))
    assert answer.token_ids[0] == GREEDY[0]
    assert not {0, 223} & set(answer.token_ids[:5])
    assert len(answer.token_ids) >= 5


def test_a_seed_repeats_and_is_needed(naive: NaiveModel) -> None:
    answers = [
        naive.generate(PROMPT, SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)).token_ids
        for seed in (3, 3, 4)
    ]
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(ValueError, match="seed"):
        naive.generate(PROMPT, SamplingParams())


def test_a_choice_without_alternative_has_an_infinite_margin(naive: NaiveModel) -> None:
    answer = naive.generate(PROMPT, SamplingParams(max_tokens=4, seed=1, top_k=1))
    assert answer.token_ids == list(GREEDY[:4])
    assert answer.margins == [math.inf] * 4


def test_short_prompts_are_padded_on_the_left_either_way(naive: NaiveModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert naive.generate([7, 9], params, "forced_tail") == naive.generate([7, 9], params, "left_pad")
    assert naive.generate([7, 9], params) == naive.generate([0, 0, 7, 9], params)


def test_forced_tokens_are_no_part_of_the_answer(naive: NaiveModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    whole = naive.generate(PROMPT, SamplingParams(temperature=0, max_tokens=7, ignore_eos=True))
    tail = naive.generate([*PROMPT, *GREEDY[:2]], params, "forced_tail")
    assert tail.token_ids == whole.token_ids[2:]
    padded = naive.generate([*PROMPT, *GREEDY[:2]], params, "left_pad")
    assert len(padded.token_ids) == 5
    assert padded.margins != tail.margins


def test_whole_blocks_of_padding_change_nothing(naive: NaiveModel) -> None:
    ids = torch.randint(2, 512, (1, 5, 4), generator=torch.Generator().manual_seed(1))
    padded = torch.cat((torch.zeros(1, 3, 4, dtype=ids.dtype), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    plain, shifted = naive.forward(ids), naive.forward(padded, mask)
    torch.testing.assert_close(shifted.logits[:, 3:], plain.logits, atol=1e-4, rtol=1e-4)
