"""GELU, from one part of a wide buffer to a part of another.

gelu(y) = y / 2 (1 + erf(y / sqrt(2)))
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.jit import cdiv, jit, power_of_2, tl

TILE_NUMBERS = 1024
"""Numbers of a row that one program takes at most."""
NUM_WARPS = 4
INVERSE_SQRT_2: tl.constexpr = tl.constexpr(0.7071067811865476)


def gelu_into(source: Tensor, out: Tensor) -> None:
    """out = gelu(source), number by number.

    source, out: [N, F], whose rows may lie apart; `out` is overwritten.
    """
    out.copy_(F.gelu(source))


@jit
def gelu_of(y: tl.tensor) -> tl.tensor:
    """gelu(y), fp32."""
    return 0.5 * y * (1.0 + tl.erf(y * INVERSE_SQRT_2))


@jit
def _gelu_tile(
    source: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    source_stride: tl.tensor,
    out_stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """TILE numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < width
    result = gelu_of(tl.load(source + row * source_stride + place, mask=inside, other=0).to(tl.float32))
    tl.store(out + row * out_stride + place, result.to(out.dtype.element_ty), mask=inside)


def triton_gelu_into(source: Tensor, out: Tensor) -> None:
    """`gelu_into` in Triton: y / 2 (1 + erf(y / sqrt(2))), rounded once. A program takes a part of one row."""
    assert source.shape == out.shape
    assert source.stride(1) == out.stride(1) == 1
    rows, width = source.shape
    tile = min(power_of_2(width), TILE_NUMBERS)
    _gelu_tile[(rows, cdiv(width, tile))](
        source, out, width, source.stride(0), out.stride(0), TILE=tile, num_warps=NUM_WARPS
    )
