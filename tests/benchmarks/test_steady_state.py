"""The steady state, with cores whose step time and so whose open rows are known."""

import numpy as np
import pytest

from benchmarks.drive import Course, Drive
from benchmarks.mixed import figures, run_arrivals
from benchmarks.models import Workload
from benchmarks.steady_state import StepTime, open_rows, rows_in_steady_state, rows_wanted
from benchmarks.traffic import Traffic
from tests.benchmarks.fake_core import BLOCK, FakeCore

ROWS = 512
WORKLOAD = Workload("D", prompt_tokens=32, answer_tokens=512)
SEEDS = range(8)
FULL_STEP = 24e-3
"""Seconds of a step of ROWS rows."""
CAPACITY = ROWS * BLOCK / FULL_STEP
OFFERED = 0.85 * CAPACITY


def core(constant: float, prompts: float = 0.0) -> FakeCore:
    """Steps of which a share is `constant`, and the rest grows with the rows; `prompts` seconds if any is in one."""
    per_row = (1 - constant) * FULL_STEP / ROWS
    return FakeCore(max_rows=ROWS, fixed=constant * FULL_STEP, per_row=per_row, prompts=prompts, per_position=2e-6)


def traffic(offered: float, seed: int) -> Traffic:
    return Traffic(WORKLOAD, 64, offered, np.random.default_rng(seed))


def rows_by_littles_law(constant: float, offered: float) -> float:
    """n with n x BLOCK / (a + b n) = offered, prompts not reckoned with."""
    a, b = constant * FULL_STEP, (1 - constant) * FULL_STEP / ROWS
    return offered * a / (BLOCK - offered * b)


def measured(
    fake: FakeCore, offered: float, seed: int, arriving: int = ROWS, steady_rows: int = ROWS
) -> dict[str, float]:
    course, begin, end = run_arrivals(fake, traffic(offered, seed), arriving, steady_rows, fake.clock)
    return figures(course, begin, end, CAPACITY, offered)


@pytest.mark.parametrize(("constant", "prompts"), [(0.1, 0.0), (0.25, 0.0), (0.25, 1e-3), (0.6, 1e-3)], ids=str)
def test_what_is_offered_is_counted_where_the_server_keeps_up(constant: float, prompts: float) -> None:
    # As many arrive as are open, in the time of one answer, and a tenth more for the ramp.
    arriving = round(1.1 * rows_by_littles_law(constant, OFFERED))
    rows = [measured(core(constant, prompts), OFFERED, seed, arriving) for seed in SEEDS]
    assert np.mean([row["of_offered"] for row in rows]) == pytest.approx(1, abs=0.02)
    start, end = (np.mean([row[f"rows_open_at_{when}"] for row in rows]) for when in ("start", "end"))
    assert start == pytest.approx(end, rel=0.06)


def test_from_an_empty_batch_less_would_be_counted() -> None:
    assert measured(core(0.25), OFFERED, 0, steady_rows=0)["of_offered"] < 0.9


@pytest.mark.parametrize("constant", [0.1, 0.25, 0.6, 1.0])
def test_rows_are_those_of_littles_law(constant: float) -> None:
    fake = core(constant)
    drive = Drive(fake, fake.clock)
    found = rows_in_steady_state(drive, traffic(OFFERED, 0), ROWS, ROWS)
    # A little more: an answer's last block is not whole, and prompts take their time.
    assert found == pytest.approx(1.02 * rows_by_littles_law(constant, OFFERED), rel=0.04)
    assert drive.open == []
    assert not fake.has_work


def test_nothing_but_arrivals_is_submitted_while_tokens_count() -> None:
    fake = core(0.25)
    course, begin, end = run_arrivals(fake, traffic(OFFERED, 0), ROWS, ROWS, fake.clock)
    assert len(course.first_tokens) == ROWS
    assert 0 < begin < end
    arrived = fake.submitted[-ROWS:]
    # Those that were opened have been so before the first step of the course.
    assert all(moment <= arrived[0][0] for moment, _ in fake.submitted[:-ROWS])
    assert all(len(request.prompt) <= 4 * 3 * WORKLOAD.prompt_tokens for _, request in arrived)


def test_a_server_that_cannot_keep_up_has_all_rows_open_and_no_better_figure() -> None:
    row = measured(core(0.25), 1.2 * CAPACITY, 0)
    assert row["rows_open"] > 0.98 * ROWS
    assert row["tok_s"] < CAPACITY
    assert row["tok_s"] == pytest.approx(CAPACITY, rel=0.03)


def test_open_rows_makes_up_for_those_that_are_answered_meanwhile() -> None:
    fake = FakeCore(max_rows=ROWS, fixed=FULL_STEP, per_row=0.0, positions=2048)
    drive = Drive(fake, fake.clock)
    open_rows(drive, traffic(CAPACITY, 0), 300)
    assert len(drive.open) == 300
    assert len(fake.submitted) > 300


def test_a_step_time_is_taken_between_returns() -> None:
    course = Course(steps=[(1.0, 5, 20), (3.0, 10, 40), (4.0, 20, 75)])
    assert StepTime.of(course) == StepTime(rows=15.0, seconds=1.5, tokens_per_row=115 / 30)


@pytest.mark.parametrize("steps", [[], [(1.0, 5, 20)], [(1.0, 5, 20), (2.0, 0, 0)]])
def test_without_a_decoding_step_there_is_no_step_time(steps: list[tuple[float, int, int]]) -> None:
    with pytest.raises(RuntimeError, match="let more requests arrive"):
        StepTime.of(Course(steps=steps))


def test_wanted_rows_follow_a_line_that_neither_falls_nor_starts_below_nothing() -> None:
    def seen(*points: tuple[float, float]) -> list[StepTime]:
        return [StepTime(rows, seconds, 4.0) for rows, seconds in points]

    # One point: 10 ms whatever the rows. Two: 5 ms and 0.05 ms a row.
    assert rows_wanted(40_000, seen((100, 0.01)), 512) == 100
    assert rows_wanted(40_000, seen((100, 0.01), (200, 0.015)), 512) == 100
    assert rows_wanted(50_000, seen((100, 0.01), (200, 0.015)), 512) == 167
    assert rows_wanted(100_000, seen((100, 0.01), (200, 0.015)), 512) == 512
    assert rows_wanted(40_000, seen((100, 0.012), (200, 0.008)), 512) == 100
    assert rows_wanted(30_000, seen((100, 0.001), (200, 0.02)), 512) == 1
