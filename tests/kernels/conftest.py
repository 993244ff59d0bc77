from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adjust import AdjustmentTables
from kernels.dispatch import Implementation, Kernels, select_kernels
from kernels.late_norm import LateNorm
from kernels.logprobs import Logprobs
from kernels.sampler import SamplingTables

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES: list[tuple[Implementation, torch.device]] = (
    [("torch", CPU), ("torch", CUDA), ("triton", CUDA)]
    if torch.cuda.is_available()
    else [("torch", CPU), ("triton", CPU)]
)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each implementation in turn, to be called with tensors on the CPU."""
    implementation, device = request.param
    return called_from_cpu(select_kernels(device, implementation), device)


@pytest.fixture
def triton_kernels() -> Kernels:
    """The Triton kernels: on a GPU where there is one, otherwise interpreted."""
    implementation, device = CASES[-1]
    return called_from_cpu(select_kernels(device, implementation), device)


def called_from_cpu(kernels: Kernels, device: torch.device) -> Kernels:
    """Kernels that take and return tensors on the CPU, and change their arguments there as on the device."""
    if device.type == "cpu":
        return kernels
    moved: dict[str, Any] = {}
    for field in fields(kernels):
        value = getattr(kernels, field.name)
        moved[field.name] = _Moved(value, device) if callable(value) else value
    return Kernels(**moved)


class _Moved:
    """A function whose tensors are moved to the device for the call, and what it changes moved back."""

    def __init__(self, function: Any, device: torch.device) -> None:
        self._function = function
        self._device = device

    def __call__(self, *arguments: Any) -> Any:
        moved = [_move(argument, self._device) for argument in arguments]
        result = self._function(*moved)
        for argument, there in zip(arguments, moved, strict=True):
            if isinstance(argument, Tensor):
                back = there.cpu()
                if not torch.equal(argument.nan_to_num(), back.nan_to_num()):
                    argument.copy_(back)
        if result is None:
            return None
        if isinstance(result, Logprobs):
            return Logprobs(*(part.cpu() for part in result))
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if 0 in value.stride():
            return value.to(device)
        # With its strides: `to` would close the gaps between rows.
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return there.copy_(value)
    if isinstance(value, SamplingTables | AdjustmentTables | LateNorm):
        return replace(value, **{name: _move(part, device) for name, part in vars(value).items()})
    return value
