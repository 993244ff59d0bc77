"""Answers whole and as both kinds of streams, of which a scripted engine says the tokens."""

from collections.abc import Sequence
from typing import Any

from engine.types import Delta, FinishReason, GenerationRequest
from tests.server.fakes import EOS, FakeEngine, Harness, events, told

CHUNK_UNITS = ("block", "token")
USAGE_IN_STREAMS = {"include_usage": True, "continuous_usage_stats": True}


def says(token_ids: Sequence[int], ends: FinishReason = "length", sizes: Sequence[int] = (4,)) -> FakeEngine:
    """An engine whose every answer is these tokens, in blocks of `sizes` in turn; "stop" ends it at the last token."""
    return FakeEngine(lambda request: deltas(request, token_ids, ends, sizes))


def deltas(
    request: GenerationRequest, token_ids: Sequence[int], ends: FinishReason, sizes: Sequence[int]
) -> list[Delta]:
    """The same as one request's deltas."""
    tokens, place = list(token_ids), 0
    cut: list[Delta] = []
    while place < len(tokens):
        size = sizes[len(cut) % len(sizes)]
        part = tuple(tokens[place : place + size])
        place += size
        last = place >= len(tokens)
        cut.append(
            Delta(
                request_id=request.request_id,
                token_ids=part,
                logprobs=told(request, part),
                finish_reason=ends if last else None,
                stop_reason=part[-1] if last and ends == "stop" and part[-1] != EOS else None,
            )
        )
    return cut


async def whole(harness: Harness, **fields: Any) -> dict[str, Any]:
    """The answer as one body."""
    response = await harness.complete(**fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def streamed(harness: Harness, **fields: Any) -> dict[str, Any]:
    """The same answer, put together from a stream's chunks."""
    response = await harness.complete(stream=True, stream_options=USAGE_IN_STREAMS, **fields)
    assert response.status_code == 200, response.text
    return joined(events(response.content.decode()))


def joined(stream: list[Any]) -> dict[str, Any]:
    """A stream's events as the answer without streaming has them; they have the usage, in every chunk and in the end.

    Fails where the order of chunks or what is said once only is not as it has to be.
    """
    *chunks, last, done = stream
    assert done == "[DONE]"
    assert last["choices"] == []
    choices: dict[int, dict[str, Any]] = {}
    counted = 0
    for chunk in chunks:
        assert chunk["usage"]["completion_tokens"] >= counted
        counted = chunk["usage"]["completion_tokens"]
        (part,) = chunk["choices"]
        if (choice := choices.get(part["index"])) is None:
            choices[part["index"]] = part
            continue
        assert choice["finish_reason"] is None, "a chunk after the last one"
        assert "prompt_token_ids" not in part
        choice["text"] += part["text"]
        choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
        if choice["logprobs"] is not None:
            for name, array in part["logprobs"].items():
                choice["logprobs"][name] += array
        if "token_ids" in part:
            choice["token_ids"] += part["token_ids"]
    assert counted == last["usage"]["completion_tokens"]
    return {**last, "choices": [choices[index] for index in sorted(choices)]}


async def everywhere(engine: FakeEngine, **fields: Any) -> dict[str, Any]:
    """The answer, after checking that both kinds of streams say the same."""
    return await agreed([Harness(engine, stream_chunks=unit) for unit in CHUNK_UNITS], **fields)


async def agreed(harnesses: Sequence[Harness], **fields: Any) -> dict[str, Any]:
    """The first one's answer, after checking that the streams of all say the same."""
    answer = await whole(harnesses[0], **fields)
    for harness in harnesses:
        stream = await streamed(harness, **fields)
        unit = harness.state.settings.stream_chunks
        assert (stream["choices"], stream["usage"]) == (answer["choices"], answer["usage"]), unit
    return answer
