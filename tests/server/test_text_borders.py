"""Answers whole and streamed where borders of characters, tokens, chunks and stop strings meet at every offset."""

import itertools
from typing import Any

import pytest

from engine.types import Delta, GenerationRequest
from tests.engine import borders
from tests.engine.borders import BLOCK, CHARACTERS
from tests.server.answers import CHUNK_UNITS, agreed, deltas
from tests.server.fakes import INFO, FakeEngine, Harness

HALF = borders.ids(borders.bytewise("漢".encode()[:2]))
"""What prompts end with: part of a character, which is text where they are echoed."""
NAME = borders.tokenizer().token_name


def prompt(index: int) -> list[int]:
    """Asks for the answer with this index."""
    return [1 + index, *HALF]


@pytest.mark.parametrize(("echo", "logprobs"), [(False, None), (True, 3)])
@pytest.mark.parametrize("character", CHARACTERS, ids=repr)
async def test_whole_and_streamed_answers_read_the_same(character: bytes, echo: bool, logprobs: int | None) -> None:
    assert INFO.block_length == BLOCK
    # The second half ends with the character: nothing comes that would complete it, or a stop string it begins.
    whole = [borders.bytewise(answer) for answer in borders.answers(character)]
    answers = whole + [answer[: -len(b")yz")] for answer in whole]

    def script(request: GenerationRequest) -> list[Delta]:
        return deltas(request, borders.ids(answers[request.prompt_token_ids[0] - 1]), "length", (BLOCK,))

    harnesses = [Harness(FakeEngine(script), borders.tokenizer(), stream_chunks=unit) for unit in CHUNK_UNITS]
    fields = {"prompt": [prompt(index) for index in range(len(answers))], "echo": echo, "logprobs": logprobs}
    for stop, include in itertools.product(borders.stops(character), (False, True)):
        answer = await agreed(
            harnesses, **fields, stop=list(stop), include_stop_str_in_output=include, max_tokens=len(whole[-1])
        )
        expected = [
            expected_choice(index, answers[index], stop, include=include, echo=echo, logprobs=logprobs)
            for index in range(len(answers))
        ]
        assert [visible(choice) for choice in answer["choices"]] == [choice for choice, _ in expected], (stop, include)
        assert answer["usage"]["completion_tokens"] == sum(tokens for _, tokens in expected)


def visible(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice without the values of its logprobs."""
    told = choice["logprobs"]
    told = told and {
        "tokens": told["tokens"],
        "text_offset": told["text_offset"],
        "likeliest": [top and len(top) for top in told["top_logprobs"]],
    }
    return {**choice, "logprobs": told}


def expected_choice(
    index: int, tokens: list[bytes], stop: tuple[str, ...], *, include: bool, echo: bool, logprobs: int | None
) -> tuple[dict[str, Any], int]:
    """What `visible` has to show, and the tokens that count."""
    text, count, met = borders.expected(tokens, stop, include=include)
    asked = prompt(index)
    echoed = borders.tokenizer().decode(asked) if echo else ""
    told: dict[str, Any] | None = None
    if logprobs is not None:
        data = [b"".join(tokens[:place]) for place in range(count)]
        asked_data = [b"".join(borders.contents(asked[:place])) for place in range(len(asked))] if echo else []
        told = {
            "tokens": [NAME(token) for token in (asked if echo else []) + borders.ids(tokens[:count])],
            "text_offset": [len(borders.complete(part)) for part in asked_data]
            + [len(echoed) + len(borders.complete(part)) for part in data],
            "likeliest": ([None] + [logprobs or 1] * len(HALF) if echo else []) + [logprobs or 1] * count,
        }
    choice = {
        "index": index,
        "text": echoed + text,
        "finish_reason": "length" if met is None else "stop",
        "stop_reason": met,
        "logprobs": told,
    }
    return choice, count
