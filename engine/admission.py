"""When a waiting sequence may take a row: enough pages have to be free that it does not soon lose them again."""

from collections.abc import Callable
from typing import NamedTuple


class Occupancy(NamedTuple):
    """What admission depends on. All counts are pages, but for `running`."""

    capacity: int
    free: int
    running: int
    """Sequences that hold a row."""
    running_worst: int
    """What they can come to hold together, if they share nothing."""
    prompt: int
    """What the waiting sequence takes of the free ones at once: all up to its first decode but those that it shares
    with sequences that hold them."""
    worst: int
    """What it can come to hold."""


AdmissionRule = Callable[[Occupancy], bool]


def may_admit(pages: Occupancy) -> bool:
    """Whether to admit the sequence that is next.

    If the worst case of all sequences fits into the pool, nothing can be preempted, and it is admitted. So it is when
    nothing runs, since a request that the whole pool could not hold is never queued.

    Otherwise pages may run out: answers mostly end before max_tokens, but nobody knows which. What that costs is
    computing the positions of a preempted sequence again, so that has to be paid for beforehand: after the prompt's
    pages, max(prompt, running + 1) more have to be free. With a page for each row, all of them go on for at least a
    page's positions. With as many pages as the prompt has, they decode at least half as many positions as the prefill
    computes before the next preemption: R rows take at most R pages in each page_size steps, so F >= R free pages last
    for floor(F / R) x page_size steps or more, in which the rows decode at least F / 2 x page_size positions.

    This bounds the recomputed positions. A preempted sequence is ahead of all that were preempted before it, and needs
    its own pages once more as headroom: those have to come from sequences that end, each of whose pages is as many
    useful positions, and what is left free admits only half as much again. So a page of an ended sequence pays for two
    recomputed pages at the very most. In practice it is far less: tests/engine/test_admission.py measures it.
    """
    if pages.running_worst + pages.worst <= pages.capacity:
        return True
    return pages.free >= pages.prompt + max(pages.prompt, pages.running + 1)
