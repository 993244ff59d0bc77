"""Logprobs in answers: whole, by block and by token."""

import math
from typing import Any

import pytest

from engine.types import Delta, GenerationRequest, TokenLogprobs
from tests.server.fakes import EOS, REPLY, FakeEngine, Harness, events, tokenizer
from tests.server.test_text_options import everywhere, says

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
