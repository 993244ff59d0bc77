import numpy as np
import pytest
import torch

from engine.staging import SLOTS, Staging


def devices() -> list[torch.device]:
    """Where staging is tested: the CPU, and CUDA where there is a device."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", devices(), ids=str)
def test_values_arrive_as_they_were_given_whatever_comes_after(device: torch.device) -> None:
    staging = Staging(device)
    kept = []
    for step in range(3 * SLOTS):
        with staging.step():
            for size in (1, 7, 1 << 10, 1 << (12 + step)):
                values = np.arange(step, step + size)
                kept.append((values, staging.upload(values, np.int32)))
    for values, tensor in kept:
        assert tensor.dtype is torch.int32
        assert tensor.device.type == device.type
        assert tensor.cpu().tolist() == values.tolist()


@pytest.mark.parametrize("device", devices(), ids=str)
def test_a_tensor_is_filled_in_the_order_of_what_is_queued(device: torch.device) -> None:
    staging = Staging(device)
    target = torch.zeros(4, 3, dtype=torch.int32, device=device)
    seen = []
    for step in range(3 * SLOTS):
        with staging.step():
            values = np.arange(step, step + 6, dtype=np.int32).reshape(2, 3)
            staging.fill(target[:2], values)
            seen.append((target.clone(), values))
    for tensor, values in seen:
        assert tensor.tolist() == [*values.tolist(), [0, 0, 0], [0, 0, 0]]


def test_a_tensor_is_filled_with_its_own_shape_and_type_only() -> None:
    staging = Staging(torch.device("cpu"))
    for values in (np.zeros(2, np.int32), np.zeros(3, np.int64)):
        with pytest.raises(AssertionError):
            staging.fill(torch.zeros(3, dtype=torch.int32), values)


@pytest.mark.parametrize("device", devices(), ids=str)
def test_shapes_and_types(device: torch.device) -> None:
    staging = Staging(device)
    with staging.step():
        assert staging.upload([[1, 2], [3, 4]], np.int64).tolist() == [[1, 2], [3, 4]]
        assert staging.upload([0.5], np.float32).dtype is torch.float32
        assert staging.upload([], np.int32).shape == (0,)
