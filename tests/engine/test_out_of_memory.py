import numpy as np
import pytest
import torch

from engine.out_of_memory import is_out_of_memory

PETABYTE = 1 << 50


def test_the_cpus_own_exceptions_count() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(PETABYTE, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(PETABYTE, np.uint8)
    assert is_out_of_memory(of_torch.value) and is_out_of_memory(of_numpy.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_cudas_exception_counts() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(PETABYTE, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)


def test_what_fails_in_cleaning_up_counts() -> None:
    def capture() -> None:
        try:
            torch.empty(PETABYTE, dtype=torch.uint8)
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capture()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        KeyError("out of memory"),
    ],
)
def test_nothing_else_counts(error: Exception) -> None:
    assert not is_out_of_memory(error)
