from engine.router import choose_engine
from engine.types import EngineLoad


def test_fewest_waiting_then_fewest_running_then_first() -> None:
    assert choose_engine([EngineLoad(waiting=1), EngineLoad(running=9)]) == 1
    assert choose_engine([EngineLoad(running=3), EngineLoad(running=2)]) == 1
    assert choose_engine([EngineLoad(), EngineLoad()]) == 0
