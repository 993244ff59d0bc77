"""The first half of an FFN: a product, its bias, and GELU behind it.

gelu(y) = y / 2 (1 + erf(y / sqrt(2)))
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import TensorDescriptor, cdiv, jit, power_of_2, tl
from kernels.linear import linear

TILE_NUMBERS = 2048
"""Numbers that one program takes through GELU."""
TILE_M, TILE_N, TILE_K = 128, 256, 64
"""The fused product: a program makes tiles [TILE_M, TILE_N] in steps of TILE_K."""
BAND = 8
"""Tiles of rows that are worked on together, so that they share a part of the weights in the L2 cache."""
STAGES = 3
NUM_WARPS = 8
INVERSE_SQRT_2: tl.constexpr = tl.constexpr(0.7071067811865476)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x @ weight + bias).

    x: [N, in]. weight: [in, out]. bias: [out] or None. Returns [N, out].
    """
    return F.gelu(linear(x, weight, bias))


@jit
def _gelu(y: tl.tensor) -> tl.tensor:
    return 0.5 * y * (1.0 + tl.erf(y * INVERSE_SQRT_2))


@jit
def _gelu_in_place(numbers: tl.tensor, count: tl.tensor, TILE: tl.constexpr) -> None:
    """GELU of TILE numbers where they are."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < count
    y = tl.load(numbers + place, mask=inside, other=0).to(tl.float32)
    tl.store(numbers + place, _gelu(y).to(numbers.dtype.element_ty), mask=inside)


@jit
def _linear_gelu_tiles(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Every `programs`-th tile of the result, in bands of BAND tiles of rows. x, weight, result: tensor descriptors."""
    programs = tl.num_programs(0)
    tiles_m, tiles_n = tl.cdiv(rows, TILE_M), tl.cdiv(width, TILE_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        first_m = tile // (BAND * tiles_n) * BAND
        band = tl.minimum(tiles_m - first_m, BAND)
        within = tile % (BAND * tiles_n)
        m, n = (first_m + within % band) * TILE_M, within // band * TILE_N
        product = tl.zeros([TILE_M, TILE_N], tl.float32)
        for k in tl.range(0, inner, TILE_K, num_stages=STAGES):
            left, right = x.load([m, k]), weight.load([k, n])
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product)
        if BIAS:
            columns = n + tl.arange(0, TILE_N)
            product += tl.load(bias + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
        result.store([m, n], _gelu(product).to(result.dtype))


def triton_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_gelu` as cuBLAS's product, which Triton takes through gelu(y) = y / 2 (1 + erf(y / sqrt(2))) in place."""
    product = linear(x, weight, bias)
    count = product.numel()
    _gelu_in_place[(cdiv(count, TILE_NUMBERS),)](product, count, TILE=TILE_NUMBERS, num_warps=8)
    return product


def fused_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_gelu` as one Triton kernel: gelu(x @ weight + bias), the product in fp32 until behind GELU.

    For bf16 and fp16, everything contiguous, `in` and `out` multiples of 8: the hardware copies whole tiles (TMA).
    """
    rows, inner = x.shape
    width = weight.shape[1]
    assert x.is_contiguous() and weight.is_contiguous() and x.element_size() == 2
    assert inner % 8 == 0 and width % 8 == 0
    result = x.new_empty(rows, width)
    tile_m = max(64, min(power_of_2(rows), TILE_M))
    tile_n = max(16, min(power_of_2(width), TILE_N))
    tiles = cdiv(rows, tile_m) * cdiv(width, tile_n)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    _linear_gelu_tiles[(min(tiles, processors),)](
        TensorDescriptor.from_tensor(x, [tile_m, TILE_K]),
        TensorDescriptor.from_tensor(weight, [TILE_K, tile_n]),
        bias,
        TensorDescriptor.from_tensor(result, [tile_m, tile_n]),
        rows,
        width,
        inner,
        BIAS=bias is not None,
        WIDEN=not x.is_cuda,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_K=TILE_K,
        BAND=BAND,
        STAGES=STAGES,
        num_warps=NUM_WARPS,
    )
    return result
