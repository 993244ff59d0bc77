"""Launch settings that `benchmarks.kernels --sweep` compares, to choose the kernels' constants by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from kernels import decode_attention, gelu, local_attention, prefill_attention, sampler
from kernels.dispatch import Kernels, select_kernels
from kernels.prefill_attention import Tiling


@dataclass(frozen=True)
class Setting:
    """Values for constants of the operation's module."""

    name: str
    constants: Mapping[str, object]


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


def _grid(names: tuple[str, ...], rows: tuple[tuple[int, ...], ...]) -> Iterator[Setting]:
    for values in rows:
        constants = dict(zip(names, values, strict=True))
        yield Setting(", ".join(f"{name} {value}" for name, value in constants.items()), constants)


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
        "local_attention_and_gelu",
        local_attention,
        (
            *_grid(
                ("TILE_NUMBERS", "NUM_WARPS"),
                ((512, 2), (512, 4), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8)),
            ),
            *_grid(("GELU_NUMBERS",), ((512,), (2048,), (4096,))),
        ),
    ),
    Sweep("gelu_into", gelu, tuple(_grid(("TILE_NUMBERS", "NUM_WARPS"), ((512, 2), (1024, 4), (2048, 4), (2048, 8))))),
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
