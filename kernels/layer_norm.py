"""The residual sum of a layer, together with the layer norm that reads it.

One pass over memory closes a layer and prepares the input of the next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import jit, power_of_2, tl


def residual_normalise(x: Tensor, branch: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalise the sum.

    x' = x + branch;   n = (x' - mean(x')) / sqrt(var(x') + eps)

    x, branch: [N, H]; no branch in front of the first layer, where x' is x itself. Rows of x may lie apart. Sum and
    statistics are fp32; x' is rounded to x's dtype before it is normalised. Returns x' and n, [N, H] each.
    """
    x = _residual_sum(x, branch)
    return x, F.layer_norm(x, (x.shape[-1],), None, None, eps)


def residual_layer_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """n * weight + bias, with the n of `residual_normalise`: behind the last layer.

    weight, bias: [H]. Returns [N, H].
    """
    x = _residual_sum(x, branch)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _residual_sum(x: Tensor, branch: Tensor | None) -> Tensor:
    # Of two numbers in a low precision, torch rounds the fp32 sum once.
    return x if branch is None else x + branch


@jit
def _norm_row(
    x: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    STORE_SUM: tl.constexpr,
    AFFINE: tl.constexpr,
    TILE_H: tl.constexpr,
) -> None:
    """Sum, statistics and norm of one row, which fits into a tile."""
    place = tl.program_id(0).to(tl.int64)
    row = place * width
    dims = tl.arange(0, TILE_H)
    inside = dims < width
    value = tl.load(x + place * x_stride + dims, mask=inside, other=0)
    if ADD:
        value32 = value.to(tl.float32) + tl.load(branch + row + dims, mask=inside, other=0).to(tl.float32)
        value = value32.to(value.dtype)
    if STORE_SUM:
        tl.store(total + row + dims, value, mask=inside)
    value32 = value.to(tl.float32)
    centred = tl.where(inside, value32 - tl.sum(value32, 0) / width, 0.0)
    result = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    if AFFINE:
        result *= tl.load(weight + dims, mask=inside, other=0).to(tl.float32)
        result += tl.load(bias + dims, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row + dims, result.to(value.dtype), mask=inside)


def triton_residual_normalise(x: Tensor, branch: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`residual_normalise` in Triton: x' = x + branch and (x' - mean) / sqrt(var + eps), in one pass over memory.

    A program holds a whole row. Without a branch x' is x itself. All but the rows of x contiguous.
    """
    total = None if branch is None else torch.empty_like(branch)
    normed = _launch(x, branch, None, None, total, eps)
    return x if total is None else total, normed


def triton_residual_layer_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`residual_layer_norm` in Triton: the norm of x + branch times weight, plus bias; the sum itself is not stored."""
    return _launch(x, branch, weight, bias, None, eps)


def _launch(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, total: Tensor | None, eps: float
) -> Tensor:
    assert x.stride(1) == 1
    assert branch is None or branch.is_contiguous()
    rows, width = x.shape
    tile_h = power_of_2(width)
    normed = x.new_empty(x.shape)
    _norm_row[(rows,)](
        x,
        branch,
        weight,
        bias,
        total,
        normed,
        width,
        x.stride(0),
        eps,
        ADD=branch is not None,
        STORE_SUM=total is not None,
        AFFINE=weight is not None,
        TILE_H=tile_h,
        num_warps=max(1, min(16, tile_h // 512)),
    )
    return normed
