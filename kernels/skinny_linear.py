"""The product of few rows and a weight matrix, which is bound by reading the weights."""

import torch
from torch import Tensor

from kernels.jit import cdiv, jit, power_of_2, tl

MAX_ROWS = 4
"""With more rows, products are better left to tensor cores."""
TILE_N, TILE_K = 16, 256
"""A program makes TILE_N columns of the result from TILE_K of their weights at a time, or half as many with more than
two rows, whose sums take the registers."""
STAGES = 4
NUM_WARPS = 4


@jit
def _partial_products(x: tl.tensor, weights: tl.tensor, k: tl.tensor, inner: tl.tensor) -> tl.tensor:
    """Products of a row's numbers `k` and their weights [TILE_K, TILE_N], not yet added up."""
    return tl.load(x + k, mask=k < inner, other=0).to(tl.float32)[:, None] * weights


@jit
def _skinny_columns(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    result: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """TILE_N columns of one to four rows. Each weight is read once; sums are kept apart until the end."""
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inside = columns < width
    sums0 = tl.zeros([TILE_K, TILE_N], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in tl.range(0, inner, TILE_K, num_stages=STAGES):
        k = first + tl.arange(0, TILE_K)
        where = k.to(tl.int64)[:, None] * width + columns[None, :]
        weights = tl.load(weight + where, mask=(k < inner)[:, None] & inside[None, :], other=0).to(tl.float32)
        sums0 += _partial_products(x, weights, k, inner)
        if ROWS > 1:
            sums1 += _partial_products(x + inner, weights, k, inner)
        if ROWS > 2:
            sums2 += _partial_products(x + 2 * inner, weights, k, inner)
        if ROWS > 3:
            sums3 += _partial_products(x + 3 * inner, weights, k, inner)
    for row in tl.static_range(ROWS):
        sums = sums0 if row == 0 else (sums1 if row == 1 else (sums2 if row == 2 else sums3))
        product = tl.sum(sums, 0)
        if BIAS:
            product += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
        tl.store(result + row * width + columns, product.to(result.dtype.element_ty), mask=inside)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.linear.linear` in Triton for one to MAX_ROWS rows: x @ weight + bias, added up in fp32.

    x: [N, in]. weight: [in, out]. bias: [out] or None. Everything contiguous. Returns [N, out].
    """
    assert x.is_contiguous() and weight.is_contiguous() and 1 <= x.shape[0] <= MAX_ROWS
    rows, inner = x.shape
    width = weight.shape[1]
    result = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    _skinny_columns[(cdiv(width, TILE_N),)](
        x,
        weight,
        bias,
        result,
        inner,
        width,
        ROWS=rows,
        BIAS=bias is not None,
        TILE_N=TILE_N,
        TILE_K=min(TILE_K if rows <= 2 else TILE_K // 2, max(16, power_of_2(inner))),
        STAGES=STAGES,
        num_warps=NUM_WARPS,
    )
    return result
