"""Which engine gets a request: a pure function of its prompt and of what the engines say of their load."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from engine.types import EngineInfo, EngineLoad, GenerationRequest


class Choice(NamedTuple):
    """The place of the chosen engine, and whether it was chosen for the prompt's prefix."""

    place: int
    by_prefix: bool


def choose_engine(loads: Sequence[EngineLoad], preferred: int | None = None, slack: int = 0) -> Choice:
    """The engine with the fewest waiting requests, then the fewest running; the first among equals.

    `preferred` is the place of the one whose prefix cache probably holds the prompt's beginning. It is chosen while it
    has at most `slack` open requests more than the least busy one, and lets nothing wait that would run there.
    """
    least = min(range(len(loads)), key=lambda place: (loads[place].waiting, loads[place].running))
    if preferred is None:
        return Choice(least, by_prefix=False)
    best, rest = loads[preferred], loads[least]
    near = best.running + best.waiting <= rest.running + rest.waiting + slack
    if near and (not best.waiting or rest.waiting):
        return Choice(preferred, by_prefix=True)
    return Choice(least, by_prefix=False)


def preferred_engine(request: GenerationRequest, engines: Sequence[int], page_tokens: int) -> int | None:
    """The place in `engines` (their numbers) that prompts which begin like this one's go to.

    None for a prompt of no more than `page_tokens`, of which no whole page could be shared. By rendezvous hashing: all
    front ends agree without having spoken, and where an engine comes or goes, only its own prompts move.
    """
    size = page_tokens * 4  # of the packed prompt
    if len(request.prompt) <= size:
        return None
    start = hashlib.sha256(request.cache_salt.encode() + b"\0" + request.prompt[:size]).digest()
    scores = [hashlib.sha256(b"%b%d" % (start, engine)).digest() for engine in engines]
    return scores.index(max(scores))


def prefix_slack(info: EngineInfo) -> int:
    """Open requests by which prefixes may unbalance the engines: few of the rows, but more than none on small ones."""
    return max(2, info.max_rows // 32)
