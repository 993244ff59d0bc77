"""Log-probabilities against a float64 softmax and Python's own sorting."""

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.logprobs import MAX_TOP
from tests.kernels.reference import DTYPES, int32, random


def likeliest(line: Tensor, number: int) -> list[int]:
    return sorted(range(len(line)), key=lambda token: (-float(line[token]), token))[:number]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 50, 5000])
def test_chosen_and_likeliest(kernels: Kernels, dtype: torch.dtype, vocab_size: int) -> None:
    # Rounded so that many are equal.
    logits = (random(6, vocab_size, scale=4.0) * 4).round().div(4).to(dtype)
    wanted, tokens = [-1, 0, 1, 5, 20, 20], [0, 3, vocab_size - 1, 2, 1, 6]
    chosen, ids, values = kernels.top_logprobs(logits, int32(tokens), int32(wanted))
    exact = logits.double().log_softmax(1)
    assert chosen[0] == 0
    for row, (want, token) in enumerate(zip(wanted, tokens, strict=True)):
        number = max(0, min(want, vocab_size))
        assert ids[row].tolist() == likeliest(logits[row], number) + [-1] * (MAX_TOP - number)
        assert values[row, number:].eq(-torch.inf).all()
        torch.testing.assert_close(
            values[row, :number].double(), exact[row, ids[row, :number].long()], atol=2e-5, rtol=1e-6
        )
        if want >= 0:
            assert abs(float(chosen[row] - exact[row, token])) < 2e-5


def test_the_best_tokens_number_is_the_same_float_both_ways(kernels: Kernels) -> None:
    logits = random(16, 3000, scale=5.0)
    best = logits.argmax(1).int()
    chosen, ids, values = kernels.top_logprobs(logits, best, int32([1] * 16))
    assert torch.equal(ids[:, 0], best)
    assert torch.equal(values[:, 0], chosen)


def test_tokens_that_cannot_be(kernels: Kernels) -> None:
    logits = torch.full((1, 40), -torch.inf)
    logits[0, [7, 30]] = torch.tensor([1.0, 0.0])
    chosen, ids, values = kernels.top_logprobs(logits, int32([5]), int32([4]))
    assert chosen.tolist() == [-torch.inf]
    assert ids[0, :4].tolist() == [7, 30, 0, 1]
    assert values[0, 2:4].tolist() == [-torch.inf] * 2


@pytest.mark.parametrize("bad", [[torch.nan, 0.0, 1.0], [torch.inf, 0.0, 1.0], [-torch.inf] * 3])
def test_what_is_not_finite_is_nan(kernels: Kernels, bad: list[float]) -> None:
    logits = torch.tensor([bad, [0.0, 1.0, 2.0]])
    chosen, _, values = kernels.top_logprobs(logits, int32([1, 1]), int32([2, 2]))
    assert chosen.isnan().tolist() == [True, False]
    assert values[1, :2].isfinite().all()
