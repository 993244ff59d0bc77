"""Says which step fails to end, while it does: the supervisor only knows that one does, and gives the service up."""

import logging
import time
from collections.abc import Callable

from engine.step_plan import StepPlan

log = logging.getLogger(__name__)


class StepWatchdog:
    """Watches steps from another thread than the one that runs them, and logs each that takes too long, once."""

    def __init__(
        self,
        timeout_s: float,
        underway: Callable[[], StepPlan | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`underway` gives the step that is worked on; it is called by the thread that calls `check`."""
        self._timeout_s = timeout_s
        self._underway = underway
        self._clock = clock
        self._began: float | None = None
        self._logged: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def end(self) -> None:
        """The step that began last is over."""
        self._began = None

    def check(self) -> None:
        """Log the step in progress if it is late and was not logged yet. To be called every now and then."""
        began = self._began
        if began is None or began == self._logged:
            return
        seconds = self._clock() - began
        if seconds <= self._timeout_s:
            return
        self._logged = began
        log.error("a step hangs", extra={"seconds": seconds, **step_fields(self._underway())})


def step_fields(plan: StepPlan | None) -> dict[str, object]:
    """What a log record says of a step: its number and the ids of its requests; nothing before it is planned."""
    return {} if plan is None else {"step": plan.number, "requests": plan.request_ids}
