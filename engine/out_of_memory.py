"""Which exceptions mean that memory ran out: the device's, or the host's where the host is the device."""

import torch

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


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator, and CUDA outside of torch's, have no exception of their own.
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
