from collections import Counter

from engine.router import Choice, choose_engine, preferred_engine
from engine.types import EngineLoad, GenerationRequest, SamplingParams

PAGE = 8


def request(*tokens: int, salt: str = "") -> GenerationRequest:
    return GenerationRequest.of(request_id=0, prompt_token_ids=tokens, params=SamplingParams(), cache_salt=salt)


def test_fewest_waiting_then_fewest_running_then_first() -> None:
    assert choose_engine([EngineLoad(waiting=1), EngineLoad(running=9)]).place == 1
    assert choose_engine([EngineLoad(running=3), EngineLoad(running=2)]).place == 1
    assert choose_engine([EngineLoad(), EngineLoad()]) == Choice(0, by_prefix=False)


def test_the_preferred_engine_is_chosen_until_it_is_too_busy() -> None:
    for running, place in ((0, 1), (5, 1), (6, 0)):
        loads = [EngineLoad(running=3), EngineLoad(running=running)]
        assert choose_engine(loads, preferred=1, slack=2) == Choice(place, by_prefix=place == 1)


def test_nothing_waits_for_a_prefix_where_another_engine_has_a_row_free() -> None:
    waiting = EngineLoad(running=4, waiting=1)
    assert choose_engine([EngineLoad(running=4), waiting], preferred=1, slack=9).place == 0
    assert choose_engine([EngineLoad(running=4, waiting=1), waiting], preferred=1, slack=9).place == 1


def test_equal_beginnings_have_one_engine_and_different_ones_are_spread() -> None:
    start = tuple(range(1, PAGE + 1))
    engines = range(4)
    chosen = {preferred_engine(request(*start, *rest), engines, PAGE) for rest in ((9,), (10, 11), tuple(range(90)))}
    assert len(chosen) == 1
    others = Counter(preferred_engine(request(number, *start), engines, PAGE) for number in range(400))
    assert all(60 < others[place] < 140 for place in engines)
    salted = {preferred_engine(request(*start, 9, salt=str(number)), engines, PAGE) for number in range(40)}
    assert len(salted) == 4


def test_a_prompt_without_a_whole_page_to_share_has_none() -> None:
    assert preferred_engine(request(*range(PAGE)), [0, 1], PAGE) is None
    assert preferred_engine(request(*range(PAGE + 1)), [0, 1], PAGE) is not None


def test_an_engine_that_goes_takes_only_its_own_prompts_with_it() -> None:
    everybody, fewer = [0, 1, 2], [0, 2]
    for number in range(50):
        prompt = request(number, *range(PAGE))
        before = preferred_engine(prompt, everybody, PAGE)
        after = preferred_engine(prompt, fewer, PAGE)
        assert before is not None and after is not None
        assert everybody[before] in (1, fewer[after])
