"""Formulas that the kernels are compared with, and how close they have to come.

Written for any dtype, without the functions that the kernels are made of: in float64 they are the truth, in a low
precision they are the plain torch that a kernel may not be worse than.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def assert_exact_as_torch(ours: Tensor, formula: Callable[..., Tensor], *inputs: object) -> None:
    """|ours - exact| <= 2 |formula in the inputs' dtype - exact| + atol, as the largest of all entries."""
    exact = formula(*(_cast(value, torch.float64) for value in inputs))
    plain = formula(*inputs)
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    allowed = 2 * float((plain.double() - exact).abs().max()) + ATOL[ours.dtype] * (1 + float(exact.abs().max()))
    error = float((ours.double() - exact).abs().max())
    assert error <= allowed, f"error {error} where {allowed} is allowed"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers in a wider buffer of nines, so that rows lie apart. tensor: [N, W]."""
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 24), 9.0)
    part = wide[:, 8:-16]
    return part.copy_(tensor)


def is_whole_around(part: Tensor) -> bool:
    """Whether the rest of a buffer that `apart` made is as it was."""
    rows, width = part.shape[0], part.stride(0)
    wide = part.as_strided((rows, width), (width, 1), 0)
    return bool((wide[:, :8] == 9).all() and (wide[:, -16:] == 9).all())


def int32(values: Sequence[int]) -> Tensor:
    """A tensor of int32."""
    return torch.tensor(values, dtype=torch.int32)


def attention(query: Tensor, keys: Tensor, values: Tensor, positions: Sequence[int], scale: float) -> Tensor:
    """Causal attention of query [S, heads, D], at `positions`, to keys and values [T, heads, D], at 0..T-1."""
    outputs = []
    for one, position in zip(query, positions, strict=True):
        seen_keys, seen_values = keys[: position + 1], values[: position + 1]
        scores = (seen_keys * one).sum(-1) * scale  # [T, heads]
        weights = (scores - scores.amax(0)).exp()
        weights = weights / weights.sum(0)
        outputs.append((weights[..., None] * seen_values).sum(0))
    return torch.stack(outputs)


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
