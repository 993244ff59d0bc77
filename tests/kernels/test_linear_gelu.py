"""The product with GELU behind it: each way to compute it against the formula."""

import math

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.linear_gelu import fused_linear_gelu
from tests.kernels.conftest import CASES
from tests.kernels.reference import DTYPES, assert_exact_as_torch, random


def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = (x[:, :, None] * weight).sum(1)
    product = product if bias is None else product + bias
    return 0.5 * product * (1 + torch.erf(product / math.sqrt(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gelu_of_a_product(kernels: Kernels, dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    x, weight = random(rows, 37, dtype=dtype), random(37, 53, dtype=dtype, seed=1)
    bias = random(53, dtype=dtype, seed=2) if with_bias else None
    assert_exact_as_torch(kernels.linear_gelu(x, weight, bias), formula, x, weight, bias)


def test_no_rows(kernels: Kernels) -> None:
    assert kernels.linear_gelu(torch.zeros(0, 5), torch.zeros(5, 3), torch.zeros(3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 8, 8), (3, 72, 24), (150, 128, 520), (64, 64, 256)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fused(dtype: torch.dtype, rows: int, inner: int, width: int, with_bias: bool) -> None:
    x, weight = random(rows, inner, dtype=dtype), random(inner, width, dtype=dtype, seed=1, scale=0.2)
    bias = random(width, dtype=dtype, seed=2) if with_bias else None
    device = CASES[-1][1]
    fused = fused_linear_gelu(x.to(device), weight.to(device), None if bias is None else bias.to(device)).cpu()
    assert_exact_as_torch(fused, formula, x, weight, bias)


def test_fused_in_bands_of_tiles() -> None:
    """More tiles than programs, and a last band that is not full."""
    x, weight = random(1100, 16, dtype=torch.float16), random(16, 600, dtype=torch.float16, seed=1)
    device = CASES[-1][1]
    assert_exact_as_torch(fused_linear_gelu(x.to(device), weight.to(device), None).cpu(), formula, x, weight, None)
