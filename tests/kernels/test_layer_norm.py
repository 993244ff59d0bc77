"""Residual sum and layer norms against the formula."""

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from tests.kernels.reference import DTYPES, assert_exact_as_torch, random

SHAPES = [(1, 1), (3, 7), (2, 64), (5, 130), (2, 2048)]
EPS = 1e-3


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_branches", [True, False])
def test_norms(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int], with_branches: bool) -> None:
    x, attention, ffn = (random(*shape, dtype=dtype, seed=seed, scale=3) for seed in range(3))
    weight1, bias1, weight2, bias2 = (random(shape[1], dtype=dtype, seed=seed) for seed in range(3, 7))
    add1, add2 = (attention, ffn) if with_branches else (None, None)
    total, first, second = kernels.residual_layer_norms(x, add1, add2, weight1, bias1, weight2, bias2, EPS)
    terms = (x, attention, ffn) if with_branches else (x,)
    assert_exact_as_torch(total, lambda *terms: sum(terms[1:], terms[0]), *terms)
    assert_exact_as_torch(first, normed, total, weight1, bias1)
    assert_exact_as_torch(second, normed, total, weight2, bias2)
    assert torch.equal(kernels.residual_layer_norm(x, add1, add2, weight1, bias1, EPS), first)
    assert torch.equal(x, random(*shape, dtype=dtype, seed=0, scale=3)), "the input is not to be changed"


def test_sum_is_rounded_once(kernels: Kernels) -> None:
    x = torch.tensor([[2048.0, 0.0]], dtype=torch.float16)
    small = torch.tensor([[0.75, 0.0]], dtype=torch.float16)
    one = torch.ones(2, dtype=torch.float16)
    total, _, _ = kernels.residual_layer_norms(x, small, small, one, one, one, one, EPS)
    assert total[0, 0] == 2050, "2048 + 0.75 is 2048 in float16, 2048 + 1.5 is 2050"
