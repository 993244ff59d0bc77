import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from engine.messages import EngineStatus, Submit
from engine.step_plan import StepPlan
from engine.types import GenerationRequest, SamplingParams
from engine.watchdog import StepWatchdog
from engine.worker import report_status
from kernels.dispatch import Kernels, torch_kernels
from tests.engine.helpers import GoldenModel
from tests.engine.scheduling import make_scheduler, make_sequence, must_schedule
from tests.engine.worker_bench import worker_bench


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plan() -> StepPlan:
    """A step of two requests, one of which is prefilled and decoded."""
    scheduler = make_scheduler()
    scheduler.add([make_sequence(7, 4), make_sequence(3, 12)])
    return must_schedule(scheduler)


def test_a_late_step_is_logged_once(clock: Clock, plan: StepPlan, caplog: pytest.LogCaptureFixture) -> None:
    watchdog = StepWatchdog(5.0, lambda: plan, clock)
    watchdog.begin()
    clock.now += 5.0
    watchdog.check()
    assert not caplog.records
    clock.now += 0.5
    watchdog.check()
    clock.now += 100
    watchdog.check()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert {name: vars(record)[name] for name in ("step", "requests", "seconds")} == {
        "step": 1,
        "requests": [3, 7],
        "seconds": 5.5,
    }


def test_each_step_has_its_own_time(clock: Clock, plan: StepPlan, caplog: pytest.LogCaptureFixture) -> None:
    watchdog = StepWatchdog(5.0, lambda: plan, clock)
    for _ in range(3):
        watchdog.begin()
        clock.now += 4.0
        watchdog.check()
        watchdog.end()
        clock.now += 60.0
        watchdog.check()
    assert not caplog.records
    for _ in range(2):
        watchdog.begin()
        clock.now += 6.0
        watchdog.check()
        watchdog.end()
    assert len(caplog.records) == 2


def test_a_step_that_is_not_planned_yet_is_logged_too(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    watchdog = StepWatchdog(5.0, lambda: None, clock)
    watchdog.begin()
    clock.now += 6.0
    watchdog.check()
    assert [record.getMessage() for record in caplog.records] == ["a step hangs"]


def held_kernels(free: threading.Event) -> Kernels:
    """Kernels whose products wait until `free` is set."""
    whole = torch_kernels()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert free.wait(30)
        return whole.linear(x, weight, bias)

    return replace(whole, linear=linear)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("overlapped", [False, True], ids=["synchronous", "overlapped"])
def test_a_worker_says_which_step_hangs_while_it_does(
    tmp_path: Path, overlapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = GoldenModel("lookup_prefix2")
    requests = [
        GenerationRequest.of(
            request_id=request_id,
            prompt_token_ids=tuple(range(10, 30)),
            params=SamplingParams(max_tokens=12, temperature=0, seed=0, ignore_eos=True),
        )
        for request_id in (41, 42)
    ]
    free, stop = threading.Event(), threading.Event()
    free.set()
    core = model.core(kernels=held_kernels(free), max_rows=2, overlapped=overlapped)
    with worker_bench(core, tmp_path, step_timeout_s=0.5) as bench:
        threads = [
            threading.Thread(target=bench.worker.run),
            threading.Thread(target=report_status, args=(bench.worker, bench.control, stop)),
        ]
        for thread in threads:
            thread.start()
        peer = bench.connect()
        peer.send(Submit(group_id=1, requests=requests[:1]))
        wait_for(lambda: peer.finished(41))
        assert not caplog.records
        free.clear()
        peer.send(Submit(group_id=2, requests=requests[1:]))
        wait_for(lambda: bool(caplog.records))
        assert not peer.deltas(42), "the step is still under way"
        assert any(isinstance(told, EngineStatus) and told.step_started is not None for told in bench.told())
        time.sleep(1.2)
        free.set()
        wait_for(lambda: peer.finished(42))
        bench.shut_down()
        stop.set()
        for thread in threads:
            thread.join(20)
        assert [peer.tokens(item.request_id) for item in requests] == [
            model.oracle(item).token_ids for item in requests
        ]
    (record,) = caplog.records
    assert (record.levelno, vars(record)["requests"], vars(record)["step"]) == (logging.ERROR, [42], 4)
    assert 0.5 < vars(record)["seconds"] < 2, "before the supervisor, which has it from the same thread, gives up"
