"""The offline API with the embedded model."""

import pytest

from engine import LLM, SamplingParams
from engine.config import ConfigError
from engine.types import InvalidRequestError

PROMPTS = ["Once upon a time", "The little dog", "Lily and Tom"]


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "overlapped"])
def llm(request: pytest.FixtureRequest) -> LLM:
    """One model for all tests: each leaves its engine empty."""
    return LLM(device="cpu", max_rows=2, max_waiting=3, max_step_positions=64, overlapped=request.param)


def test_answers_come_in_the_order_of_the_prompts_however_many(llm: LLM) -> None:
    prompts = [f"{PROMPTS[i % 3]} {i}" for i in range(9)]
    params = [SamplingParams(max_tokens=5 + 7 * (i % 4), seed=i, ignore_eos=True) for i in range(9)]
    answers = llm.generate(prompts, params, progress=False)
    assert [answer.prompt for answer in answers] == prompts
    assert [len(answer.token_ids) for answer in answers] == [5 + 7 * (i % 4) for i in range(9)]
    alone = [llm.generate(prompt, each, progress=False)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert alone == answers


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, seed=4)
    pieces = list(llm.stream(PROMPTS[0], params))
    assert len(pieces) > 5
    assert "".join(pieces) == llm.generate(PROMPTS[0], params, progress=False)[0].text


def test_a_stop_string_ends_the_answer_and_frees_its_row(llm: LLM) -> None:
    free = llm.generate(PROMPTS[0], SamplingParams(max_tokens=80, seed=1), progress=False)[0]
    stop = free.text[25:30]
    answer = llm.generate(PROMPTS[0], SamplingParams(max_tokens=80, seed=1, stop=(stop,)), progress=False)[0]
    assert answer.text == free.text[: free.text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < len(free.token_ids)


def test_an_abandoned_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=1000, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm._core.state_of(llm._next_id - 1) is None
    assert [len(a.token_ids) for a in llm.generate(PROMPTS, SamplingParams(max_tokens=3), progress=False)] == [3, 3, 3]


def test_token_ids_are_a_prompt_too(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    params = SamplingParams(max_tokens=12, temperature=0)
    by_ids, by_text = (llm.generate(prompt, params, progress=False)[0] for prompt in (ids, PROMPTS[0]))
    assert by_ids.token_ids == by_text.token_ids
    assert llm.generate([ids, ids[:3]], params, progress=False)[0].token_ids == by_ids.token_ids


def test_an_empty_prompt_starts_from_end_of_text(llm: LLM) -> None:
    assert llm.generate("", SamplingParams(max_tokens=3), progress=False)[0].prompt_token_ids == (0,)


def test_a_seed_is_drawn_where_none_is_given(llm: LLM) -> None:
    texts = {answer.text for answer in llm.generate([PROMPTS[0]] * 4, SamplingParams(max_tokens=40), progress=False)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(max_tokens=10**6), r"prompt 1: .*2048"),
        (SamplingParams(temperature=float("nan")), "prompt 0: .*temperature"),
        (SamplingParams(stop_token_ids=(10**6,)), "prompt 0: .*"),
        ([SamplingParams()], "1 params were given for 2 prompts"),
    ],
)
def test_a_bad_request_is_named_before_anything_runs(
    llm: LLM, params: SamplingParams | list[SamplingParams], message: str
) -> None:
    prompts = [PROMPTS[0], PROMPTS[1]]
    if "prompt 1" in message:
        params = [SamplingParams(), SamplingParams(max_tokens=10**6)]
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompts, params, progress=False)


def test_a_model_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        LLM("./nowhere")
