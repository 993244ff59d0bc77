"""Residual sum and layer norms against the formula."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.dispatch import Kernels
from tests.kernels.reference import DTYPES, apart, assert_exact_as_torch, is_whole_around, random

SHAPES = [(1, 1), (3, 7), (2, 64), (5, 130), (2, 2048)]
EPS = 1e-3


def normalised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + EPS).sqrt()


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return normalised(x) * weight + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_branch", [True, False])
def test_norms(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int], with_branch: bool) -> None:
    x = random(*shape, dtype=dtype, scale=3)
    branch = random(*shape, dtype=dtype, seed=1, scale=3) if with_branch else None
    weight, bias = (random(shape[1], dtype=dtype, seed=seed) for seed in (2, 3))
    total, n = kernels.residual_normalise(x, branch, EPS)
    terms = (x,) if branch is None else (x, branch)
    assert_exact_as_torch(total, lambda *terms: sum(terms[1:], terms[0]), *terms)
    assert_exact_as_torch(n, normalised, total)
    assert_exact_as_torch(kernels.residual_layer_norm(x, branch, weight, bias, EPS), normed, total, weight, bias)
    assert torch.equal(x, random(*shape, dtype=dtype, scale=3)), "the input is not to be changed"


@pytest.mark.parametrize("with_branch", [True, False])
def test_rows_may_lie_apart(kernels: Kernels, with_branch: bool) -> None:
    x = random(5, 130)
    branch, weight, bias = random(5, 130, seed=1), random(130, seed=2), random(130, seed=3)
    added = branch if with_branch else None
    spread = apart(x)
    for ours, expected in zip(
        kernels.residual_normalise(spread, added, EPS), kernels.residual_normalise(x, added, EPS), strict=True
    ):
        assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    ours = kernels.residual_layer_norm(spread, added, weight, bias, EPS)
    assert_close(ours, kernels.residual_layer_norm(x, added, weight, bias, EPS), rtol=1e-6, atol=1e-6)
    assert ours.is_contiguous()
    assert is_whole_around(spread)


def test_the_rounded_sum_is_normalised(kernels: Kernels) -> None:
    x = torch.tensor([[2048.0, 2048.0]], dtype=torch.float16)
    branch = torch.tensor([[0.75, 0.25]], dtype=torch.float16)
    total, n = kernels.residual_normalise(x, branch, EPS)
    assert total.tolist() == [[2048, 2048]]
    assert n.tolist() == [[0, 0]]
