"""A layer norm behind the product that reads it: for few rows, where a launch costs more than what it computes.

With a weight whose columns sum to zero, x @ W is (x - mean(x)) @ W, so all that n @ W + b lacks is a factor and a bias:

    n @ W + b = r (x @ W) + b           r = 1 / sqrt(var(x) + eps)

What reads the product takes both along, and finds r in x once more. A residual stream may also be short of a constant
c, the biases of the layers so far, whose sums would each be a pass over it: then c + x is what is normalised.
"""

from dataclasses import dataclass

from torch import Tensor

from kernels.jit import jit, tl


@dataclass(frozen=True)
class LateNorm:
    """How a product x @ W becomes that of the norm of c + x."""

    x: Tensor
    """[N, H], contiguous."""
    missing: Tensor
    """c, [H] fp32."""
    missing_product: Tensor
    """c @ W, [M] fp32."""
    bias: Tensor
    """b, [M]."""
    eps: float


def normalise_late(product: Tensor, norm: LateNorm) -> Tensor:
    """r (product + c @ W) + b, rounded once.

    product: x @ W without a bias, [N, M]. Returns [N, M].
    """
    variance = (norm.x.float() + norm.missing).var(-1, correction=0, keepdim=True)
    exact = (product.float() + norm.missing_product) * (variance + norm.eps).rsqrt() + norm.bias
    return exact.to(product.dtype)


@jit
def late_factor(
    x: tl.tensor, missing: tl.tensor, row: tl.tensor, width: tl.tensor, eps: tl.tensor, TILE_H: tl.constexpr
) -> tl.tensor:
    """r of one row, which fits into a tile."""
    dims = tl.arange(0, TILE_H)
    inside = dims < width
    value = tl.load(x + row * width + dims, mask=inside, other=0).to(tl.float32)
    value += tl.load(missing + dims, mask=inside, other=0)
    centred = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    return 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)


@jit
def load_normalised(
    product: tl.tensor,
    columns: tl.tensor,
    factor: tl.tensor,
    missing_product: tl.tensor,
    bias: tl.tensor,
    inside: tl.tensor,
    LATE: tl.constexpr,
) -> tl.tensor:
    """Some columns of rows of a product, in fp32; with LATE those of the norm's, `factor` being the rows' r."""
    value = tl.load(product + columns, mask=inside, other=0).to(tl.float32)
    if LATE:
        value = (value + tl.load(missing_product + columns, mask=inside, other=0)) * factor
        value += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    return value
