"""What stands for a pool of CUDA graphs where there is no device to capture on."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from engine.graph_pool import GraphPool

T = TypeVar("T")


class EagerPool(GraphPool):
    """A replay does the work again."""

    def __init__(self, captures_left: int = 1 << 30) -> None:
        """Memory runs out at the capture behind so many."""
        self.captures_left = captures_left

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        work()
        if not self.captures_left:
            raise torch.OutOfMemoryError("no memory for another graph")
        self.captures_left -= 1
        return work


def graph_pool_on(device: torch.device) -> GraphPool:
    """A pool for tests that run on the CPU too."""
    return GraphPool() if device.type == "cuda" else EagerPool()


def use_pool(monkeypatch: pytest.MonkeyPatch, pool: GraphPool) -> None:
    """Engine cores that are made from now on have graphs in this pool, whatever their device."""
    monkeypatch.setattr("engine.core.graph_pool", lambda config: pool)
