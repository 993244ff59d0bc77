import numpy as np
import pytest

from benchmarks.drive import Course, Drive, at_once
from benchmarks.models import Workload
from benchmarks.traffic import Arrival, fixed_requests, mixed_requests, wanted_tokens
from engine.types import GenerationRequest
from tests.benchmarks.fake_core import FakeCore

WORKLOAD = Workload("D", prompt_tokens=8, answer_tokens=10)


def requests(number: int) -> list[GenerationRequest]:
    return mixed_requests(WORKLOAD, number, 64, np.random.default_rng(3))


def driven(step_seconds: float = 1.0) -> tuple[FakeCore, Drive]:
    core = FakeCore(max_rows=8, fixed=step_seconds, per_row=0.0)
    return core, Drive(core, core.clock)


def test_all_at_once_until_all_is_answered() -> None:
    _, drive = driven()
    drive.begin(at_once(fixed_requests(WORKLOAD, 2, 64, np.random.default_rng(3))))
    course = drive.to_the_end()
    # A step for the prompts, and three blocks of which the last is half used.
    assert course.steps == [(1.0, 0, 0), (2.0, 2, 8), (3.0, 2, 8), (4.0, 2, 4)]
    assert (course.seconds, course.tokens, course.rows) == (4.0, 20, 2)
    assert course.first_tokens == [(0.0, 2.0)] * 2
    assert drive.open == []


def test_requests_are_submitted_at_their_moments() -> None:
    core, drive = driven(0.01)
    drive.begin([Arrival(0.0, requests(1)[0]), Arrival(1.0, requests(1)[0]), Arrival(1.005, requests(1)[0])])
    course = drive.to_the_end()
    # The last comes while a step is under way.
    assert [moment for moment, _ in core.submitted] == pytest.approx([0.0, 1.0, 1.01])
    assert [moment for moment, _ in course.first_tokens] == [0.0, 1.0, 1.005]
    assert [seconds for _, seconds in course.first_tokens] == pytest.approx([0.02, 0.02, 0.025])


def test_a_course_begins_with_what_is_open_and_tells_first_tokens_of_arrivals_only() -> None:
    _, drive = driven()
    early, late = requests(1), requests(1)
    drive.submit(early)
    drive.until(lambda: drive.speak([early[0].request_id]))
    drive.begin([Arrival(0.5, late[0])])
    assert drive.course.steps == []
    drive.until(lambda: drive.all_came and drive.all_speak)
    assert [arrival for arrival, _ in drive.course.first_tokens] == [0.5]
    assert 0 < drive.course.tokens < wanted_tokens([*early, *late])


def test_stopping_leaves_nothing_open() -> None:
    core, drive = driven()
    drive.begin([Arrival(0.0, request) for request in requests(9)] + [Arrival(50.0, requests(1)[0])])
    drive.until(lambda: len(drive.course.steps) == 2)
    assert len(drive.open) == 9
    drive.stop()
    assert drive.open == []
    assert drive.all_speak
    assert not core.has_work
    assert len(core.submitted) == 9


def test_an_answer_that_ends_too_early_is_noticed() -> None:
    core, drive = driven()
    request = requests(1)[0]
    drive.submit([request])
    core.shorten(request.request_id)
    with pytest.raises(RuntimeError, match="did not end where it should"):
        drive.to_the_end()


def test_only_what_lies_in_the_window_counts() -> None:
    course = Course(steps=[(1.0, 2, 8), (2.0, 3, 12), (4.0, 1, 4)], first_tokens=[(0.5, 0.1), (1.5, 0.2)])
    assert course.tokens_between(1.5, 4.0) == 12
    assert course.first_token_times(1.0, 2.0) == [0.2]
    assert course.block_times(1.5, 5.0).tolist() == [1.0, 1.0, 1.0, 2.0]
    assert course.rows_between(1.5, 5.0) == pytest.approx((1.0 * 3 + 2.0 * 1) / 3.0)
    assert course.rows_between(5.0, 9.0) == 0
