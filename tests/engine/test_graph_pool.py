from functools import partial

import pytest
import torch
from torch import Tensor

from engine.graph_pool import GraphPool
from engine.out_of_memory import is_out_of_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def squares_of(numbers: Tensor) -> Tensor:
    """Through memory of the pool's."""
    return (numbers.double() * numbers).sum(dim=1)


def test_a_replay_reads_what_its_inputs_hold_by_then() -> None:
    pool = GraphPool()
    numbers = torch.zeros(1000, 100, device="cuda")
    replays = [pool.capture(partial(squares_of, numbers[:rows])) for rows in (1000, 10, 300)]
    for value in (1, 2, 5):
        numbers.fill_(value)
        for replay, rows in zip(replays, (1000, 10, 300), strict=True):
            assert replay().tolist() == [100 * value * value] * rows


def test_graphs_share_memory_and_give_it_back() -> None:
    pool = GraphPool()
    numbers = torch.zeros(1 << 20, 10, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    replays = [pool.capture(lambda: squares_of(numbers).sum()) for _ in range(2)]
    of_two = torch.cuda.memory_reserved() - before
    replays += [pool.capture(lambda: squares_of(numbers).sum()) for _ in range(6)]
    assert torch.cuda.memory_reserved() - before == of_two
    replays.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.parametrize("others", [0, 1])
def test_a_capture_that_runs_out_of_memory_leaves_the_others(others: int) -> None:
    pool = GraphPool()
    numbers = torch.ones(100, 100, device="cuda")
    replays = [pool.capture(lambda: squares_of(numbers)) for _ in range(others)]
    runs = 0

    def fails_when_captured() -> Tensor:
        nonlocal runs
        runs += 1
        squares = squares_of(numbers)
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(1 << 45, device="cuda")
        return squares

    with pytest.raises(RuntimeError) as caught:
        pool.capture(fails_when_captured)
    assert is_out_of_memory(caught.value)
    assert runs > 1
    replays.append(pool.capture(lambda: squares_of(numbers)))
    for replay in replays:
        assert replay().tolist() == [100.0] * 100
