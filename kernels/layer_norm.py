"""The residual sum of a GPT-NeoX layer, together with the layer norms that read it.

A layer computes x + attention(norm1(x)) + ffn(norm2(x)): both branches read the same x, so one pass over memory
can close a layer and prepare both inputs of the next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import jit, power_of_2, tl


def residual_layer_norms(
    x: Tensor,
    attention: Tensor | None,
    ffn: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a layer's two branches to the residual stream and normalise the sum twice.

    x' = x + attention + ffn;   n_i = (x' - mean(x')) / sqrt(var(x') + eps) * weight_i + bias_i

    x, attention, ffn: [N, H]; the branches are both given or both None (in front of the first layer). weights and
    biases: [H]. Sum and statistics are fp32; x' is rounded to x's dtype before it is normalised. Returns x', n1, n2,
    each [N, H].
    """
    x = _residual_sum(x, attention, ffn)
    width = (x.shape[-1],)
    return x, F.layer_norm(x, width, weight1, bias1, eps), F.layer_norm(x, width, weight2, bias2, eps)


def residual_layer_norm(
    x: Tensor, attention: Tensor | None, ffn: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`residual_layer_norms` where only one norm of the sum is wanted: behind the last layer. Returns [N, H]."""
    x = _residual_sum(x, attention, ffn)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _residual_sum(x: Tensor, attention: Tensor | None, ffn: Tensor | None) -> Tensor:
    if attention is None or ffn is None:
        return x
    return (x.float() + attention + ffn).to(x.dtype)


@jit
def _norm_row(
    x: tl.tensor,
    attention: tl.tensor,
    ffn: tl.tensor,
    weight1: tl.tensor,
    bias1: tl.tensor,
    weight2: tl.tensor,
    bias2: tl.tensor,
    total: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    STORE_SUM: tl.constexpr,
    TWO_NORMS: tl.constexpr,
    TILE_H: tl.constexpr,
) -> None:
    """Sum, statistics and one or two norms of one row, which fits into a tile."""
    row = tl.program_id(0).to(tl.int64) * width
    dims = tl.arange(0, TILE_H)
    inside = dims < width
    value = tl.load(x + row + dims, mask=inside, other=0)
    if ADD:
        value32 = value.to(tl.float32) + tl.load(attention + row + dims, mask=inside, other=0).to(tl.float32)
        value32 += tl.load(ffn + row + dims, mask=inside, other=0).to(tl.float32)
        value = value32.to(value.dtype)
    if STORE_SUM:
        tl.store(total + row + dims, value, mask=inside)
    value32 = value.to(tl.float32)
    centred = tl.where(inside, value32 - tl.sum(value32, 0) / width, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scaled = normed * tl.load(weight1 + dims, mask=inside, other=0).to(tl.float32)
    scaled += tl.load(bias1 + dims, mask=inside, other=0).to(tl.float32)
    tl.store(first + row + dims, scaled.to(value.dtype), mask=inside)
    if TWO_NORMS:
        scaled = normed * tl.load(weight2 + dims, mask=inside, other=0).to(tl.float32)
        scaled += tl.load(bias2 + dims, mask=inside, other=0).to(tl.float32)
        tl.store(second + row + dims, scaled.to(value.dtype), mask=inside)


def triton_residual_layer_norms(
    x: Tensor,
    attention: Tensor | None,
    ffn: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_layer_norms` in Triton: x' = x + attention + ffn and its two norms, in one pass over memory.

    A program holds a whole row. Where there are no branches x' is x itself.
    """
    adds = attention is not None and ffn is not None
    total = torch.empty_like(x) if adds else x
    first, second = torch.empty_like(x), torch.empty_like(x)
    _launch(x, attention, ffn, weight1, bias1, weight2, bias2, total, first, second, eps, store_sum=adds)
    return total, first, second


def triton_residual_layer_norm(
    x: Tensor, attention: Tensor | None, ffn: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`residual_layer_norm` in Triton: the norm of x + attention + ffn; the sum itself is not stored."""
    first = torch.empty_like(x)
    _launch(x, attention, ffn, weight, bias, None, None, None, first, None, eps, store_sum=False)
    return first


def _launch(
    x: Tensor,
    attention: Tensor | None,
    ffn: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    total: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    eps: float,
    *,
    store_sum: bool,
) -> None:
    assert x.is_contiguous()
    assert attention is None or attention.is_contiguous()
    assert ffn is None or ffn.is_contiguous()
    rows, width = x.shape
    tile_h = power_of_2(width)
    _norm_row[(rows,)](
        x,
        attention,
        ffn,
        weight1,
        bias1,
        weight2,
        bias2,
        total,
        first,
        second,
        width,
        eps,
        ADD=attention is not None and ffn is not None,
        STORE_SUM=store_sum,
        TWO_NORMS=second is not None,
        TILE_H=tile_h,
        num_warps=max(1, min(16, tile_h // 512)),
    )
