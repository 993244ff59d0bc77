"""The device an engine runs on."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it, `device` is the current one, whatever it is for the caller; to be entered again and again.

    Kernels are launched on the current device, graphs captured there, and streams belong to it.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_name(device: torch.device) -> str:
    """As users know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
