"""Which exceptions mean that memory ran out: the device's, or the host's where the host is the device."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",  # what is not tensors: graphs, modules, pinned memory
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory alone: with less to do, or later, it can succeed.

    What failed in cleaning up after that counts as well: a CUDA graph's capture that is broken off ends with an error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _says_so(cause):
            return True
        cause = cause.__context__
    return False


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """Do it; None where memory ran out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Only here, where the traceback is gone and with it what the attempt has allocated.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator, and CUDA outside of torch's, have no exception of their own.
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
