"""A norm behind its product against the norm in front of it."""

import pytest
import torch
from torch import Tensor

from kernels.late_norm import LateNorm, normalise_late
from tests.kernels.reference import DTYPES, assert_exact_as_torch, random

EPS = 1e-3


def behind(product: Tensor, x: Tensor, missing: Tensor, missing_product: Tensor, bias: Tensor) -> Tensor:
    """The formula, in the dtype of the product."""
    stream = x + missing.to(x.dtype)
    centred = stream - stream.mean(-1, keepdim=True)
    factor = 1 / ((centred * centred).mean(-1, keepdim=True) + EPS).sqrt()
    return (product + missing_product.to(x.dtype)) * factor + bias


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula(dtype: torch.dtype) -> None:
    x, product, bias = (random(3, width, dtype=dtype, seed=width, scale=3) for width in (40, 50, 60))
    missing, missing_product = random(40, seed=1), random(50, seed=2)
    norm = LateNorm(x, missing, missing_product, bias[0, :50], EPS)
    assert_exact_as_torch(normalise_late(product, norm), behind, product, x, missing, missing_product, bias[0, :50])


def test_it_is_the_norm_in_front_where_columns_sum_to_zero() -> None:
    x, missing, bias = random(3, 40, scale=2) + 5, random(40, seed=1), random(50, seed=2)
    weight = random(40, 50, seed=3)
    weight -= weight.mean(0)

    def in_front(x: Tensor, missing: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stream = x + missing
        centred = stream - stream.mean(-1, keepdim=True)
        return centred / ((centred * centred).mean(-1, keepdim=True) + EPS).sqrt() @ weight + bias

    late = normalise_late(x @ weight, LateNorm(x, missing, missing @ weight, bias, EPS))
    assert_exact_as_torch(late, in_front, x, missing, weight, bias)
