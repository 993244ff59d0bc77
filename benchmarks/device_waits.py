"""How long the host waits for the device: what is left of a step's time is the host's own work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch


@dataclass
class DeviceWaits:
    """Seconds spent waiting so far."""

    seconds: float = 0.0


@contextmanager
def counted_waits() -> Iterator[DeviceWaits]:
    """Count, while entered, the time this process spends in `torch.cuda.Event.synchronize`.

    The engine waits for the device nowhere else: for a step's tokens, and for a staging buffer that is still being
    read. On the CPU nothing is counted, since a launch computes.
    """
    waits = DeviceWaits()
    synchronize = torch.cuda.Event.synchronize

    def timed(event: torch.cuda.Event) -> None:
        started = time.perf_counter()
        synchronize(event)
        waits.seconds += time.perf_counter() - started

    with patch.object(torch.cuda.Event, "synchronize", timed):
        yield waits
