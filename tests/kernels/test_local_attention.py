"""Attention inside a block and GELU against their formulas, and what is stored."""

import pytest
import torch

from kernels.dispatch import Kernels, torch_kernels
from kernels.jit import interpreted
from kernels.late_norm import LateNorm, normalise_late
from kernels.rotary import rotary_table
from tests.kernels.reference import ATOL, DTYPES, apart, assert_exact_as_torch, attention, is_whole_around, random
from tests.kernels.test_gelu import formula as gelu
from tests.kernels.test_rotary import BASE, SHAPES, rotated


def attention_of_rotated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: list[int],
    dims: int,
    scale: float,
) -> torch.Tensor:
    """Attention of new positions [S, heads, D] to themselves and to older ones [T, heads, D]."""
    seen_keys = torch.cat((keys, rotated(key, positions, dims)))
    return attention(rotated(query, positions, dims), seen_keys, torch.cat((values, value)), positions, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size", "dims"), SHAPES)
@pytest.mark.parametrize(
    ("rows", "length", "first"), [(1, 1, 0), (1, 1, 4), (1, 2, 0), (4, 2, 0), (3, 3, 2), (2, 5, 0)]
)
def test_causal(
    kernels: Kernels, dtype: torch.dtype, heads: int, head_size: int, dims: int, rows: int, length: int, first: int
) -> None:
    width = heads * head_size
    qkv = random(rows * length, 3 * width, dtype=dtype)
    parts = qkv.view(rows, length, heads, 3, head_size)
    # As in the tests of GELU alone, which say why; its parts are of more and of fewer numbers than a program takes, or
    # there are none, as behind a table of tokens.
    up_scale = 0.5 if dtype == torch.bfloat16 and interpreted() else 2
    up = random(rows * length, {3: 1100, 4: 0}.get(rows, 37), dtype=dtype, seed=5, scale=up_scale)
    into = apart(torch.cat((qkv, up), dim=1))
    scratch = [torch.full((rows + 2, heads, 6, head_size), torch.nan, dtype=dtype) for _ in range(2)]
    for seed, cache in enumerate(scratch):
        cache[:rows, :, :first] = random(rows, heads, first, head_size, dtype=dtype, seed=seed + 1)
    before = [cache.clone() for cache in scratch]
    table = rotary_table(6, dims, BASE, torch.device("cpu"))
    scale = head_size**-0.5
    inner = apart(torch.empty(rows * length, width + up.shape[1], dtype=dtype))
    views = [buffer.view(rows, length, -1) for buffer in (into, inner)]
    kernels.local_attention_and_gelu(views[0], None, first, table, scratch[0], scratch[1], scale, views[1])
    assert is_whole_around(inner)
    assert is_whole_around(into)
    assert torch.equal(into[:, 3 * width :], up)
    attended = inner[:, :width].view(rows, length, heads, head_size)
    positions = list(range(first, first + length))
    for row in range(rows):
        older = [cache[row, :, :first].transpose(0, 1) for cache in before]
        assert_exact_as_torch(
            attended[row], attention_of_rotated, *parts[row].unbind(2), *older, positions, dims, scale
        )
    if up.shape[1]:
        assert_exact_as_torch(inner[:, width:], gelu, up)
    written = [cache[:rows, :, first : first + length].transpose(1, 2).flatten(0, 1) for cache in scratch]
    assert_exact_as_torch(written[0], rotated, parts[:, :, :, 1].flatten(0, 1), positions * rows, dims)
    assert torch.equal(written[1], parts[:, :, :, 2].flatten(0, 1))
    for cache, old in zip(scratch, before, strict=True):
        cache[:rows, :, first : first + length] = torch.nan
        assert torch.equal(cache.nan_to_num(9.0), old.nan_to_num(9.0)), "other places are not to be touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_size", "dims"), SHAPES)
@pytest.mark.parametrize(("rows", "length", "first"), [(1, 1, 3), (3, 1, 1), (3, 2, 0), (1, 3, 2)])
def test_late_norm(
    kernels: Kernels, dtype: torch.dtype, heads: int, head_size: int, dims: int, rows: int, length: int, first: int
) -> None:
    """As of a product that was normalised in front."""
    entries, width, inner_width = rows * length, heads * head_size, 37
    columns = 3 * width + inner_width
    # Rows whose norms differ by more than any tolerance.
    x = random(entries, 24, dtype=dtype) * torch.arange(1, entries + 1)[:, None].to(dtype)
    # Small numbers: Triton's interpreter cuts fp32 down to bf16 where a device rounds.
    bias, product = (random(n, columns, dtype=dtype, seed=n, scale=0.3) for n in (1, entries))
    norm = LateNorm(x, random(24, seed=1), random(columns, seed=2, scale=0.3), bias[0], 1e-3)
    table, scale = rotary_table(6, dims, BASE, torch.device("cpu")), head_size**-0.5
    filled = [random(rows, heads, 6, head_size, dtype=dtype, seed=seed) for seed in (5, 6)]

    def run(into: torch.Tensor, late: LateNorm | None, of: Kernels) -> tuple[torch.Tensor, list[torch.Tensor]]:
        into, inner = apart(into), apart(torch.empty(entries, width + inner_width, dtype=into.dtype))
        caches = [cache.to(into.dtype) for cache in filled]
        views = [buffer.view(rows, length, -1) for buffer in (into, inner)]
        of.local_attention_and_gelu(views[0], late, first, table, caches[0], caches[1], scale, views[1])
        assert is_whole_around(inner)
        assert is_whole_around(into)
        return inner, caches

    exact_norm = LateNorm(x.float(), norm.missing, norm.missing_product, norm.bias.float(), norm.eps)
    exact = run(normalise_late(product.float(), exact_norm), None, torch_kernels())
    plain = run(normalise_late(product, norm), None, torch_kernels())
    inner, caches = run(product, norm, kernels)
    for ours, rounded, true in zip((inner, *caches), (plain[0], *plain[1]), (exact[0], *exact[1]), strict=True):
        allowed = 2 * float((rounded.float() - true).abs().max()) + ATOL[dtype] * (1 + float(true.abs().max()))
        assert float((ours.float() - true).abs().max()) <= allowed
