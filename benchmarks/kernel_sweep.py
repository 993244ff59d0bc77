"""Launch settings that `benchmarks.kernels --sweep` compares, to choose the kernels' constants by."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from kernels import decode_attention, linear_gelu, local_attention, prefill_attention, sampler, skinny_linear
from kernels.dispatch import Kernels, select_kernels
from kernels.prefill_attention import Tiling


@dataclass(frozen=True)
class Setting:
    """Values for constants of the operation's module, and another implementation of it, if any."""

    name: str
    constants: Mapping[str, object]
    implementation: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Sweep:
    """One operation, the module that holds its constants, and what to try."""

    op: str
    module: ModuleType
    settings: tuple[Setting, ...]


@contextmanager
def applied(sweep: Sweep, setting: Setting) -> Iterator[Kernels]:
    """Kernels for CUDA under a setting; the constants are put back at the end."""
    before = {name: getattr(sweep.module, name) for name in setting.constants}
    kernels = select_kernels(torch.device("cuda"))
    if setting.implementation is not None:
        kernels = Kernels(**{**vars(kernels), sweep.op: setting.implementation})
    try:
        for name, value in setting.constants.items():
            setattr(sweep.module, name, value)
        yield kernels
    finally:
        for name, value in before.items():
            setattr(sweep.module, name, value)


def _prefill() -> Iterator[Setting]:
    for tiling in (
        Tiling(64, 64, 2, 4),
        Tiling(64, 64, 3, 4),
        Tiling(64, 128, 3, 4),
        Tiling(128, 32, 3, 8),
        Tiling(128, 64, 2, 8),
        Tiling(128, 64, 3, 8),
        Tiling(128, 128, 2, 8),
        Tiling(128, 128, 3, 8),
    ):
        name = f"{tiling.queries} queries, {tiling.positions} positions, {tiling.stages} stages, {tiling.warps} warps"
        yield Setting(name, {"TILING": tiling})


def _grid(names: tuple[str, ...], rows: tuple[tuple[int, ...], ...], prefix: str = "") -> Iterator[Setting]:
    for values in rows:
        constants = dict(zip(names, values, strict=True))
        yield Setting(prefix + ", ".join(f"{name} {value}" for name, value in constants.items()), constants)


def _products() -> Iterator[Setting]:
    yield Setting("torch's two kernels", {}, linear_gelu.linear_gelu)
    yield Setting("in place", {})
    for numbers in (1024, 4096):
        yield Setting(f"in place, TILE_NUMBERS {numbers}", {"TILE_NUMBERS": numbers})
    names = "TILE_M", "TILE_N", "TILE_K", "STAGES", "NUM_WARPS"
    tiles = (128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (128, 128, 64, 4, 4), (64, 256, 64, 3, 4), (128, 128, 128, 2, 8)
    for setting in _grid(names, tiles, "fused, "):
        yield replace(setting, implementation=linear_gelu.fused_linear_gelu)


def _few_rows() -> Iterator[Setting]:
    yield Setting("cuBLAS", {})
    names = "TILE_N", "TILE_K", "STAGES", "NUM_WARPS"
    narrow = (16, 128, 6, 4), (16, 256, 4, 4), (16, 256, 6, 4), (16, 512, 4, 8)
    wide = (32, 128, 4, 4), (32, 256, 4, 8), (64, 64, 6, 4)
    for setting in _grid(names, narrow + wide, "skinny, "):
        yield replace(setting, implementation=skinny_linear.skinny_linear)


SWEEPS = (
    Sweep("paged_prefill_attention", prefill_attention, tuple(_prefill())),
    Sweep(
        "paged_decode_attention",
        decode_attention,
        (
            *_grid(
                ("TILE_POSITIONS", "STAGES", "NUM_WARPS"),
                ((16, 2, 2), (16, 3, 2), (16, 4, 2), (32, 3, 2), (32, 3, 4), (64, 2, 4)),
            ),
            *_grid(("ENOUGH_PROGRAMS",), ((4096,), (8192,), (32768,))),
        ),
    ),
    Sweep(
        "rotary_local_attention",
        local_attention,
        tuple(
            _grid(
                ("TILE_NUMBERS", "NUM_WARPS"),
                ((512, 2), (512, 4), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8)),
            )
        ),
    ),
    Sweep("linear_gelu", linear_gelu, tuple(_products())),
    Sweep("linear", skinny_linear, tuple(_few_rows())),
    Sweep(
        "sample",
        sampler,
        (
            *_grid(("GROUPS_TILE_V",), ((2048,), (4096,), (8192,))),
            *_grid(("CANDIDATES_TILE_V",), ((2048,), (4096,))),
            *_grid(("MIN_GROUP",), ((128,), (256,))),
            *_grid(("GROUPS_WARPS",), ((8,),)),
            *_grid(("CANDIDATES_WARPS",), ((1,), (2,), (8,))),
            *_grid(("VOCABULARY_WARPS",), ((4,), (16,))),
            *_grid(("CAPACITY",), ((256,), (512,), (2048,))),
            *_grid(("VOCABULARY_TILE_V",), ((1024,), (4096,))),
        ),
    ),
)
