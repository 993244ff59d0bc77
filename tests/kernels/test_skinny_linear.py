"""Products of few rows against the formula."""

import pytest
import torch
from torch import Tensor

from kernels.skinny_linear import MAX_ROWS, skinny_linear
from tests.kernels.conftest import CASES
from tests.kernels.reference import DTYPES, assert_exact_as_torch, random
from tests.kernels.test_linear import formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
@pytest.mark.parametrize(("inner", "width"), [(5, 3), (64, 48), (300, 50)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_few_rows(dtype: torch.dtype, rows: int, inner: int, width: int, with_bias: bool) -> None:
    x, weight = random(rows, inner, dtype=dtype), random(inner, width, dtype=dtype, seed=1, scale=0.1)
    bias = random(width, dtype=dtype, seed=2) if with_bias else None

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(CASES[-1][1])

    product = skinny_linear(moved(x), moved(weight), None if bias is None else moved(bias)).cpu()
    assert_exact_as_torch(product, formula, x, weight, bias)
