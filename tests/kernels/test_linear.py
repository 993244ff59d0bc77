"""Products: the formula, and independence of the number of rows."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.linear import add_linear, linear
from tests.kernels.reference import DTYPES, assert_exact_as_torch, random


def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = (x[:, :, None] * weight).sum(1)
    return product if bias is None else product + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    x, weight = random(rows, 37, dtype=dtype), random(37, 53, dtype=dtype, seed=1)
    bias = random(53, dtype=dtype, seed=2) if with_bias else None
    assert_exact_as_torch(linear(x, weight, bias), formula, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_added_product(dtype: torch.dtype, rows: int) -> None:
    before, x, weight = (random(*shape, dtype=dtype) for shape in ((rows, 53), (rows, 37), (37, 53)))
    total = before.clone()
    add_linear(total, x, weight)
    assert_exact_as_torch(total, lambda before, x, weight: before + formula(x, weight, None), before, x, weight)


def test_no_rows() -> None:
    assert linear(torch.zeros(0, 5), torch.zeros(5, 3), torch.zeros(3)).shape == (0, 3)


def test_a_row_is_nearly_the_same_in_every_batch() -> None:
    x, weight, bias = random(64, 256), random(256, 96, seed=1), random(96, seed=2)
    together = linear(x, weight, bias)
    for rows in (1, 2, 3, 8, 31):
        assert_close(linear(x[:rows], weight, bias), together[:rows], atol=2e-5, rtol=1e-6)
