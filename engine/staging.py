"""From the host's numbers to tensors on the device, without waiting for the device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLOTS = 3
"""Steps whose uploads may be under way: the one that is planned, the one that runs, and one between."""
_ALIGNMENT = 64


class _Slot:
    """Pinned memory for one step's uploads, and the event after which the device has read it."""

    def __init__(self) -> None:
        self.memory = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
        self.used = 0
        self.read = torch.cuda.Event()

    def take(self, size: int) -> Tensor:
        """`size` bytes that nothing else of this step uses."""
        if self.used + size > self.memory.numel():
            # The old memory lives on until its copies are done: torch's pinned allocator watches over that.
            self.memory = torch.empty(2 * (self.memory.numel() + size), dtype=torch.uint8, pin_memory=True)
            self.used = 0
        start = self.used
        self.used = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return self.memory[start : start + size]


class Staging:
    """Copies a step's inputs to the device: on CUDA from a ring of pinned buffers guarded by events.

    A copy from ordinary memory would wait until the device has taken it, behind all that is queued there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slots = [_Slot() for _ in range(SLOTS)] if device.type == "cuda" else []
        self._current = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Everything uploaded inside belongs to one step. Waits only if the step SLOTS before has not been read yet."""
        if not self._slots:
            yield
            return
        self._current = (self._current + 1) % SLOTS
        slot = self._slots[self._current]
        slot.read.synchronize()
        slot.used = 0
        try:
            yield
        finally:
            slot.read.record()

    def upload(self, values: object, dtype: type[np.generic]) -> Tensor:
        """`values` (anything numpy reads) as a tensor of `dtype` on the device; the copy may be under way on return."""
        source = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        return self._staged(source).to(self.device, non_blocking=True) if self._slots else source

    def fill(self, target: Tensor, values: NDArray[Any]) -> None:
        """Write `values` into a tensor of the device, of their shape and dtype, once what is queued there is done."""
        source = torch.from_numpy(np.ascontiguousarray(values))
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        target.copy_(self._staged(source) if self._slots else source, non_blocking=True)

    def _staged(self, source: Tensor) -> Tensor:
        """The same in this step's pinned memory."""
        staged = self._slots[self._current].take(source.nbytes).view(source.dtype).view(source.shape)
        return staged.copy_(source)


def on_the_way_here(tensors: Iterable[Tensor]) -> list[Tensor]:
    """CUDA tensors in pinned memory of their own, where they have arrived once what is queued now is done."""
    return [torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True) for one in tensors]
