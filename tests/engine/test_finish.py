import pytest

from engine.finish import Cut, cut_answer
from engine.types import SamplingParams

EOS = 0


def cut(tokens: list[int], generated: int, params: SamplingParams) -> Cut:
    return cut_answer(tokens, generated, params, frozenset(params.stop_token_ids), EOS)


@pytest.mark.parametrize(
    ("tokens", "generated", "params", "expected"),
    [
        ([5, 6, 7, 8], 0, SamplingParams(max_tokens=8), Cut((5, 6, 7, 8))),
        ([5, 6, 7, 8], 4, SamplingParams(max_tokens=8), Cut((5, 6, 7, 8), "length")),
        ([5, 6, 7, 8], 4, SamplingParams(max_tokens=6), Cut((5, 6), "length")),
        ([5, 0, 7, 8], 0, SamplingParams(max_tokens=8), Cut((5, 0), "stop")),
        ([5, 0, 7, 8], 0, SamplingParams(max_tokens=1), Cut((5,), "length")),
        ([5, 0, 7, 8], 0, SamplingParams(max_tokens=2), Cut((5, 0), "stop")),
        ([5, 0, 7, 8], 0, SamplingParams(max_tokens=8, ignore_eos=True), Cut((5, 0, 7, 8))),
        ([5, 6, 7, 6], 0, SamplingParams(max_tokens=8, stop_token_ids=(6,)), Cut((5, 6), "stop", 6)),
        ([5, 6, 7, 6], 0, SamplingParams(max_tokens=8, stop_token_ids=(7, 6)), Cut((5, 6), "stop", 6)),
        ([0, 6, 7, 6], 0, SamplingParams(max_tokens=8, stop_token_ids=(0,)), Cut((0,), "stop")),
        ([0, 6], 0, SamplingParams(max_tokens=8, stop_token_ids=(0,), ignore_eos=True), Cut((0,), "stop", 0)),
        ([0, 0, 0, 0], 0, SamplingParams(max_tokens=8, min_tokens=2), Cut((0, 0, 0), "stop")),
        ([0, 0, 0, 0], 4, SamplingParams(max_tokens=16, min_tokens=8), Cut((0, 0, 0, 0))),
        ([0, 0, 0, 0], 8, SamplingParams(max_tokens=16, min_tokens=8), Cut((0,), "stop")),
        ([6, 6, 6, 6], 3, SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=(6,)), Cut((6, 6, 6), "stop", 6)),
        ([5, 0], 0, SamplingParams(max_tokens=2, min_tokens=2), Cut((5, 0), "length")),
    ],
)
def test_where_answers_end(tokens: list[int], generated: int, params: SamplingParams, expected: Cut) -> None:
    assert cut(tokens, generated, params) == expected


@pytest.mark.parametrize("offset", range(4))
def test_eos_ends_a_block_at_any_offset(offset: int) -> None:
    tokens = [5, 5, 5, 5]
    tokens[offset] = EOS
    assert cut(tokens, 4, SamplingParams(max_tokens=99)) == Cut((*([5] * offset), EOS), "stop")
