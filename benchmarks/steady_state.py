"""Puts an engine into the state that Poisson arrivals would bring it to, without waiting for it to come.

Where answers are long, a batch that starts empty needs several answers' time to find its size. So it starts with
requests that are under way already (`traffic.underway_requests`), as many as stay open on average. By Little's law that
is the number of rows n whose tokens a second are those offered:

    n x tokens of a row a step / step time(n) = offered tokens a second

`rows_in_steady_state` finds it in place, with arrivals and their prompts in the steps. It assumes that
step time(n) = a + b n between the sizes seen, with a and b of 0 or more. It opens a third of the rows, times STEPS
steps, opens as many as the estimate says, and so on; what arrives meanwhile is given up each time, since requests that
have just begun have less to read than others. After the first measurement a step is taken to be no longer with
more rows, which errs toward too few; then a line through all measurements stands for the step. Where no number is
enough, it is all rows. All of these requests are given up in the end, and `open_rows` opens others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.drive import Course, Drive
from benchmarks.traffic import Traffic
from engine.types import GenerationRequest

FIRST = 1 / 3
"""Share of the rows that the first measurement is made with."""
STEPS = 24
"""Steps of a measurement."""
MEASUREMENTS = 4


@dataclass(frozen=True)
class StepTime:
    """Means over some steps."""

    rows: float
    seconds: float
    tokens_per_row: float

    @classmethod
    def of(cls, course: Course) -> "StepTime":
        """Of all steps but the first, from whose return time is taken. Raises RuntimeError if no other decodes."""
        if not any(rows for _, rows, _ in course.steps[1:]):
            raise RuntimeError("no step is there to time: let more requests arrive, or longer ones")
        moments, rows, tokens = np.array(course.steps).T
        seconds = float(moments[-1] - moments[0]) / (len(moments) - 1)
        return cls(float(rows[1:].mean()), seconds, float(tokens[1:].sum() / rows[1:].sum()))


def rows_wanted(offered: float, seen: Sequence[StepTime], most: int) -> int:
    """Rows, 1 to `most`, at which `offered` tokens come in a second, by the line through what was seen."""
    rows, seconds = np.array([(point.rows, point.seconds) for point in seen]).T
    spread = rows - rows.mean()
    slope = float(spread @ seconds / (spread @ spread)) if spread.any() else 0.0
    # No step gets shorter with more rows, and none of no rows takes less than nothing.
    slope = min(max(slope, 0.0), float(seconds.mean() / rows.mean()))
    constant = float(seconds.mean() - slope * rows.mean())
    gain = seen[-1].tokens_per_row - offered * slope
    return most if offered * constant >= gain * most else max(1, round(offered * constant / gain))


def rows_in_steady_state(drive: Drive, traffic: Traffic, arriving: int, most: int) -> int:
    """How many rows, `most` at most, decode in the steady state of this traffic. Nothing is open at the end.

    Up to `arriving` requests arrive in each measurement. Raises RuntimeError where that is not enough for two steps.
    """
    seen: list[StepTime] = []
    number = max(1, round(FIRST * most))
    for _ in range(MEASUREMENTS):
        still = drive.open
        # Any of them: their lengths and how far they have come do not depend on one another.
        drive.give_up(still[number:])
        _open(drive, traffic.underway(max(0, number - len(still))))
        opened = set(drive.open)
        drive.begin(traffic.arrivals(arriving))
        course = drive.until(lambda: len(drive.course.steps) > STEPS)
        seen.append(StepTime.of(course))
        drive.begin(())
        drive.give_up([request_id for request_id in drive.open if request_id not in opened])
        number = rows_wanted(traffic.offered, seen, most)
    drive.stop()
    return number


def open_rows(drive: Drive, traffic: Traffic, number: int) -> None:
    """Let so many rows decode, of requests as they are open in the steady state."""
    opened = _open(drive, traffic.underway(number))
    # Some were answered while others' prompts were computed: meanwhile as many would have arrived.
    drive.submit(traffic.fresh(len(opened) - len(drive.open)))


def _open(drive: Drive, requests: list[GenerationRequest]) -> list[int]:
    """Submit requests and go on until all of them decode. Returns their ids."""
    drive.submit(requests)
    request_ids = [request.request_id for request in requests]
    drive.until(lambda: drive.speak(request_ids))
    return request_ids
