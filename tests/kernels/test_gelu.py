"""GELU between parts of buffers against the formula."""

import math

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.jit import interpreted
from tests.kernels.reference import DTYPES, apart, assert_exact_as_torch, is_whole_around, random


def formula(y: Tensor) -> Tensor:
    return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (5, 1024), (2, 1100)])
def test_from_one_buffer_to_another(kernels: Kernels, dtype: torch.dtype, rows: int, width: int) -> None:
    # Triton's interpreter cuts fp32 down to bf16 where a device rounds: a whole unit of numbers above 2 is too much.
    numbers = random(rows, width, dtype=dtype, scale=0.5 if dtype == torch.bfloat16 and interpreted() else 2)
    source, out = apart(numbers), apart(torch.empty_like(numbers))
    kernels.gelu_into(source, out)
    assert_exact_as_torch(out, formula, numbers)
    assert is_whole_around(out), "other places are not to be touched"
    assert torch.equal(source, numbers), "the input is not to be changed"
