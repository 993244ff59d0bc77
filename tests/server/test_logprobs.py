"""Logprobs in answers: whole, by block and by token."""

import asyncio
import math
from typing import Any

import pytest

from engine.types import Delta, GenerationRequest, TokenLogprobs
from tests.server.answers import everywhere, says
from tests.server.fakes import EOS, REPLY, FakeEngine, Harness, events, tokenizer, until

NAME = tokenizer().token_name


def arrays(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    logprobs: dict[str, Any] = choice["logprobs"]
    assert len({len(array) for array in logprobs.values()}) == 1
    return logprobs


async def test_none_unless_asked_for() -> None:
    answer = await everywhere(says([5, 6]))
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("top", [0, 1, 5, 20])
@pytest.mark.parametrize("sizes", [(4,), (1, 3, 2)])
async def test_an_entry_a_token(top: int, sizes: tuple[int, ...]) -> None:
    ids = [*tokenizer().encode(REPLY), EOS]
    answer = await everywhere(says(ids, "stop", sizes), logprobs=top, max_tokens=200)
    told = arrays(answer)
    assert told["tokens"] == [NAME(token) for token in ids]
    assert told["token_logprobs"] == [-token / 128 for token in ids]
    for token, likeliest in zip(ids, told["top_logprobs"], strict=True):
        assert len(likeliest) == max(top, 1)
        assert max(likeliest.values()) == likeliest[NAME(token)] == -token / 128
    text, offsets = answer["choices"][0]["text"], told["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0 and offsets[-1] == len(text)
    for token, start in zip(ids, offsets, strict=True):
        if not NAME(token).startswith("bytes:") and token != EOS:
            assert text[start:].startswith(NAME(token))


async def test_a_token_that_is_none_of_the_likeliest_comes_last() -> None:
    def script(request: GenerationRequest) -> list[Delta]:
        one = TokenLogprobs(-math.inf, (8, 9), (-0.5, -1.0))
        return [Delta(request_id=request.request_id, token_ids=(7,), finish_reason="length", logprobs=(one,))]

    told = arrays(await everywhere(FakeEngine(script), logprobs=2))
    assert told["token_logprobs"] == [-9999.0]
    assert list(told["top_logprobs"][0].items()) == [(NAME(8), -0.5), (NAME(9), -1.0), (NAME(7), -9999.0)]


async def test_tokens_behind_a_stop_string_are_not_told() -> None:
    ids = tokenizer().encode("a fox and a dog")
    answer = await everywhere(says(ids), logprobs=1, stop=["fox"], return_token_ids=True, max_tokens=99)
    (choice,) = answer["choices"]
    assert choice["text"] == "a "
    assert 0 < len(choice["token_ids"]) < len(ids)
    assert arrays(answer)["tokens"] == [NAME(token) for token in choice["token_ids"]]


async def test_a_chunk_tells_of_the_tokens_it_delivers() -> None:
    response = await Harness(says(tokenizer().encode(REPLY))).complete(
        logprobs=1, stream=True, return_token_ids=True, stop=["never"], max_tokens=99
    )
    *chunks, _done = events(response.text)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["logprobs"]["tokens"] == [NAME(token) for token in choice["token_ids"]]


async def test_fields_reach_the_engine() -> None:
    harness = Harness()
    await harness.complete(
        presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={"7": -100, "0": 2.5}, logprobs=3
    )
    (request,) = harness.engine.requests
    params = request.params
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -1, 1.5)
    assert (params.logit_bias, params.logprobs) == (((7, -100), (0, 2.5)), 3)


# --- Prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_after", [0, 1, 9])
@pytest.mark.parametrize("top", [0, 3])
async def test_an_echo_has_the_prompts_logprobs_in_front(score_after: int, top: int) -> None:
    engine = says([*tokenizer().encode(REPLY), EOS], "stop")
    engine.score_after = score_after
    prompts = ["Hi, é 漢", "x"]
    plain = await everywhere(engine, prompt=prompts, n=2, logprobs=top, max_tokens=99)
    echoed = await everywhere(engine, prompt=prompts, n=2, logprobs=top, max_tokens=99, echo=True)
    assert [len(group.scores) for group in engine.groups] == [0] * 3 + [2] * 3
    for before, choice in zip(plain["choices"], echoed["choices"], strict=True):
        prompt = prompts[choice["index"] // 2]
        ids = tokenizer().encode(prompt)
        told = choice["logprobs"]
        assert choice["text"] == prompt + before["text"]
        assert told["tokens"] == [NAME(token) for token in ids] + before["logprobs"]["tokens"]
        assert told["token_logprobs"][: len(ids)] == [None, *(-token / 128 for token in ids[1:])]
        assert told["top_logprobs"][0] is None
        assert all(len(one) == max(top, 1) for one in told["top_logprobs"][1:])
        assert told["text_offset"][len(ids) :] == [len(prompt) + place for place in before["logprobs"]["text_offset"]]
        for name in ("token_logprobs", "top_logprobs"):
            assert told[name][len(ids) :] == before["logprobs"][name]
    assert echoed["usage"] == plain["usage"]


async def test_what_lm_eval_asks_for() -> None:
    prompts = [[5, 6, 7, 8], [9]]
    for max_tokens in (0, 1):
        engine = says([11][:max_tokens])
        answer = await everywhere(
            engine, prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
        )
        assert engine.groups[0].requests == [] or max_tokens
        for ids, choice in zip(prompts, answer["choices"], strict=True):
            assert choice["finish_reason"] == "length"
            assert [len(array) for array in choice["logprobs"].values()] == [len(ids) + max_tokens] * 4
            assert choice["logprobs"]["token_logprobs"][0] is None
            assert None not in choice["logprobs"]["token_logprobs"][1:]


async def test_prompt_logprobs_by_token_id() -> None:
    answer = await everywhere(says([11]), prompt=[5, 6], prompt_logprobs=2, max_tokens=1)
    (choice,) = answer["choices"]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "6": {"logprob": -6 / 128, "decoded_token": NAME(6)},
            "7": {"logprob": -6 / 128 - 1, "decoded_token": NAME(7)},
        },
    ]
    both = await everywhere(says([11]), prompt=[5, 6], prompt_logprobs=2, logprobs=1, echo=True, max_tokens=1)
    assert both["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert [len(one or ()) for one in both["choices"][0]["logprobs"]["top_logprobs"]] == [0, 1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_cannot_be_scored_fails_the_request(stream: bool) -> None:
    engine = FakeEngine(None)
    harness = Harness(engine)
    task = asyncio.create_task(harness.complete(echo=True, logprobs=1, stream=stream))
    await engine.submitted.wait()
    await until(lambda: bool(engine.groups))
    (group,) = engine.groups
    group.feed([Delta(request_id=group.scores[0].request_id, finish_reason="error", error="no memory")])
    response = await task
    body = events(response.text)[0] if stream else response.json()
    assert "no memory" in body["error"]["message"]
    assert group.aborted == [group.requests[0].request_id]
