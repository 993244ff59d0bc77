"""Feeds an engine core requests at their moments, and keeps what came of them and when."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from benchmarks.traffic import Arrival, wanted_tokens
from engine.core import StepReport
from engine.types import GenerationRequest


class Drivable(Protocol):
    """What of an engine core is driven here."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, group: Sequence[tuple[Hashable, GenerationRequest]]) -> None:
        """Take the requests, each under its key."""

    def abort(self, key: Hashable) -> bool:
        """Forget a request."""

    def step(self) -> StepReport | None:
        """Commit a step; None if none was."""


class Clock(NamedTuple):
    """Where time comes from, in seconds."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Course:
    """What happened from a moment on. All moments are seconds from there."""

    seconds: float = 0.0
    tokens: int = 0
    rows: int = 0
    """Largest batch reached."""
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    """(moment of its return, rows, tokens) of each step that gave something."""
    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    """(moment of arrival, seconds from there to the first tokens)."""

    def tokens_between(self, begin: float, end: float) -> int:
        """Tokens given in [begin, end)."""
        return sum(tokens for moment, _, tokens in self.steps if begin <= moment < end)

    def first_token_times(self, begin: float, end: float) -> list[float]:
        """Seconds to the first tokens of the requests that arrived in [begin, end)."""
        return [seconds for arrival, seconds in self.first_tokens if begin <= arrival < end]

    def block_times(self, begin: float, end: float) -> np.ndarray:
        """Seconds between a row's blocks, once for each row of each step in [begin, end): those between steps."""
        seconds, rows = self._steps_between(begin, end)
        return seconds.repeat(rows)

    def rows_between(self, begin: float, end: float) -> float:
        """Rows that decode, on average over the time of the steps in [begin, end); 0 where there was none."""
        seconds, rows = self._steps_between(begin, end)
        return float(np.average(rows, weights=seconds)) if seconds.sum() > 0 else 0.0

    def _steps_between(self, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Duration, counted from the step before, and rows of each step that returned in [begin, end)."""
        moments, rows, _ = np.array([(min(begin, 0.0), 0, 0), *self.steps]).T
        inside = (begin <= moments[1:]) & (moments[1:] < end)
        return np.diff(moments)[inside], rows[1:][inside].astype(int)


class Drive:
    """A core under way: submits each arrival at its moment, steps, and sleeps where there is nothing to do.

    Any call that steps raises RuntimeError where an answer ends with another number of tokens than its request wants.
    """

    def __init__(self, core: Drivable, clock: Clock | None = None) -> None:
        self.course = Course()
        """Of what happened since `begin`."""
        self._core = core
        self._clock = Clock() if clock is None else clock
        self._started = self._clock.now()
        self._arrivals: Sequence[Arrival] = ()
        self._submitted = 0
        self._moments: dict[int, float] = {}
        self._wanted: dict[int, int] = {}
        self._given: Counter[int] = Counter()
        self._silent: set[int] = set()

    @property
    def open(self) -> list[int]:
        """Ids of the requests that were submitted and are not answered to their end, the latest last."""
        return list(self._wanted)

    @property
    def all_came(self) -> bool:
        """Whether the last arrival was submitted."""
        return self._submitted == len(self._arrivals)

    @property
    def all_speak(self) -> bool:
        """Whether everything that was submitted has had tokens."""
        return not self._silent

    def speak(self, request_ids: Iterable[int]) -> bool:
        """Whether these have had tokens, or were given up."""
        return self._silent.isdisjoint(request_ids)

    def begin(self, arrivals: Sequence[Arrival]) -> None:
        """Let a new course begin now, with these arrivals. What is open goes on."""
        self._arrivals, self._submitted = arrivals, 0
        self._moments = {arrival.request.request_id: arrival.seconds for arrival in arrivals}
        self.course = Course()
        self._started = self._clock.now()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Submit requests now. Those that are no arrivals do not count among first tokens."""
        self._core.add([(request.request_id, request) for request in requests])
        for request in requests:
            self._wanted[request.request_id] = wanted_tokens([request])
            self._silent.add(request.request_id)

    def give_up(self, request_ids: Iterable[int]) -> None:
        """Abort requests."""
        for request_id in request_ids:
            self._core.abort(request_id)
            self._forget(request_id)

    def stop(self) -> None:
        """Let nothing arrive any more, abort what is open, and step until the core has nothing to do."""
        course = self.course
        self.begin(())
        self.give_up(self.open)
        self.to_the_end()
        self.course = course

    def until(self, done: Callable[[], bool]) -> Course:
        """Go on until `done()`, or until nothing is open and nothing will come."""
        while not done() and (self._core.has_work or not self.all_came):
            self._turn()
        self.course.seconds = self._clock.now() - self._started
        return self.course

    def to_the_end(self) -> Course:
        """Go on until all is answered."""
        return self.until(lambda: False)

    def _turn(self) -> None:
        now = self._clock.now() - self._started
        due = self._submitted
        while due < len(self._arrivals) and self._arrivals[due].seconds <= now:
            due += 1
        if due > self._submitted:
            self.submit([arrival.request for arrival in self._arrivals[self._submitted : due]])
            self._submitted = due
        if not self._core.has_work:
            self._clock.sleep(max(0.0, self._arrivals[due].seconds - now))
        elif (report := self._core.step()) is not None:
            self._keep(report, self._clock.now() - self._started)

    def _keep(self, report: StepReport, moment: float) -> None:
        course, deltas = self.course, report.deltas
        tokens = deltas.tokens
        course.steps.append((moment, report.rows, tokens))
        course.tokens += tokens
        course.rows = max(course.rows, report.rows)
        # Not one by one: a delta made for each of thousands of rows would take the host longer than the step takes.
        self._given.update([sequence.request.request_id for sequence in deltas.sequences] * deltas.blocks.shape[1])
        for _, delta in deltas.others:
            self._given[delta.request_id] += len(delta.token_ids)
            if delta.timing is not None:
                self._silent.discard(delta.request_id)
                if delta.request_id in self._moments:
                    arrived = self._moments[delta.request_id]
                    course.first_tokens.append((arrived, moment - arrived))
            if delta.finish_reason is not None:
                given, wanted = self._given[delta.request_id], self._wanted[delta.request_id]
                if given != wanted:
                    raise RuntimeError(f"{given} tokens came and not {wanted}: an answer did not end where it should")
                self._forget(delta.request_id)

    def _forget(self, request_id: int) -> None:
        del self._wanted[request_id]
        self._given.pop(request_id, None)
        self._silent.discard(request_id)


def at_once(requests: Sequence[GenerationRequest]) -> list[Arrival]:
    """All of them at the start."""
    return [Arrival(0.0, request) for request in requests]
