"""Which engine gets a request: a pure function of what the engines say of their load."""

from collections.abc import Sequence

from engine.types import EngineLoad


def choose_engine(loads: Sequence[EngineLoad]) -> int:
    """Index of the engine with the fewest waiting requests, then the fewest running; the first among equals."""
    return min(range(len(loads)), key=lambda index: (loads[index].waiting, loads[index].running))
