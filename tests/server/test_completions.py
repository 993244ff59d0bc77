"""Whole and streamed answers."""

import asyncio
import threading

import msgspec
import pytest

from engine.client import EngineRejectedError, EngineUnavailableError
from engine.messages import ServiceState
from engine.types import SEED_RANGE, Delta, GenerationRequest
from tests.server.fakes import EOS, INFO, REPLY, FakeEngine, Harness, events, reply_deltas, tokenizer, until

REPLY_TOKENS = len(tokenizer().encode(REPLY)) + 1


async def test_a_whole_answer() -> None:
    harness = Harness()
    response = await harness.complete(max_tokens=200)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    prompt_tokens = len(tokenizer().encode("Hi"))
    assert body == {
        "object": "text_completion",
        "model": "fox",
        "choices": [{"index": 0, "text": REPLY, "finish_reason": "stop", "stop_reason": None, "logprobs": None}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": REPLY_TOKENS,
            "total_tokens": prompt_tokens + REPLY_TOKENS,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize("unit", ["block", "token"])
@pytest.mark.parametrize("max_tokens", [1, 5, 12, 20, 200])
async def test_a_stream_says_what_the_whole_answer_says(unit: str, max_tokens: int) -> None:
    whole = (await Harness().complete(max_tokens=max_tokens)).json()
    harness = Harness(stream_chunks=unit)
    response = await harness.complete(max_tokens=max_tokens, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in [*chunks, usage]} == {usage["id"]}
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    if unit == "token":
        assert len(chunks) == whole["usage"]["completion_tokens"]


async def test_chunks_have_no_usage_unless_asked() -> None:
    harness = Harness()
    *chunks, done = events((await harness.complete(stream=True)).text)
    assert done == "[DONE]"
    assert chunks
    assert all("usage" not in chunk for chunk in chunks)


async def test_four_prompt_forms() -> None:
    ids = tokenizer().encode("Hi")
    for prompt, expected in (
        ("Hi", [ids]),
        (["Hi", "", "Hi"], [ids, [EOS], ids]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ("", [[EOS]]),
    ):
        harness = Harness()
        response = await harness.complete(prompt=prompt)
        assert response.status_code == 200, prompt
        assert [list(request.prompt_token_ids) for request in harness.engine.requests] == expected
        assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_a_long_text_is_tokenised_in_a_thread_to_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the fox " * 4000
    harness = Harness()
    harness.engine.info = msgspec.structs.replace(INFO, max_length=1 << 20)
    encode, threads = harness.state.tokenizer.encode, []

    def recording(text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.get_ident())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(harness.state.tokenizer, "encode", recording)
    assert (await harness.complete(prompt=text)).status_code == 200
    assert list(harness.engine.requests[0].prompt_token_ids) == encode(text)
    # The first is the server's; the fake engine encodes its answer after that.
    assert threads[0] != threading.get_ident()


async def test_fields_reach_the_engine() -> None:
    harness = Harness()
    await harness.complete(
        max_tokens=9, temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, seed=3, stop_token_ids=[4, 5], ignore_eos=True,
        min_tokens=2, priority=-6, stop=["zzz"], user="someone", best_of=1, suffix="", model="fox-alias",
    )  # fmt: skip
    (request,) = harness.engine.requests
    assert request.priority == -6
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (9, 0.5, 0.25, 7)
    assert (params.min_p, params.seed, params.stop_token_ids) == (0.125, 3, (4, 5))
    assert (params.ignore_eos, params.min_tokens) == (True, 2)
    # Stop strings are the front end's own business.
    assert params.stop == ()


async def test_null_means_the_default() -> None:
    fields = [
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "stop", "stop_token_ids",
        "ignore_eos", "min_tokens", "stream", "stream_options", "suffix", "priority", "user", "model", "request_id",
        "logprobs", "echo", "presence_penalty", "frequency_penalty", "logit_bias", "repetition_penalty",
        "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens", "truncate_prompt_tokens",
        "prompt_logprobs", "return_token_ids",
    ]  # fmt: skip
    harness = Harness()
    response = await harness.complete(**dict.fromkeys(fields))
    assert response.status_code == 200
    params = harness.engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (16, 1.0, 1.0, 0, 0.0)


async def test_defaults_of_unsupported_fields_are_accepted() -> None:
    response = await Harness().complete(
        logprobs=None, echo=False, presence_penalty=0, frequency_penalty=0.0, repetition_penalty=1, logit_bias={},
        include_stop_str_in_output=False, skip_special_tokens=True, add_special_tokens=True, return_token_ids=False,
        stream=True, stream_options={"include_usage": None, "continuous_usage_stats": False}, top_k=-1,
    )  # fmt: skip
    assert response.status_code == 200


async def test_choices_in_prompt_major_order_with_seeds_that_count_up() -> None:
    harness = Harness(FakeEngine(lambda request: reply_deltas(request, f"[{request.params.seed}]")))
    response = await harness.complete(prompt=["Hi", "Ho"], n=3, seed=SEED_RANGE - 2, max_tokens=99)
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(6))
    seeds = [SEED_RANGE - 2, SEED_RANGE - 1, 0]
    assert [choice["text"] for choice in response.json()["choices"]] == [f"[{seed}]" for seed in seeds * 2]
    prompts = [tuple(tokenizer().encode(text)) for text in ("Hi", "Ho") for _ in range(3)]
    assert [request.prompt_token_ids for request in harness.engine.requests] == prompts
    assert len({request.request_id for request in harness.engine.requests}) == 6


@pytest.mark.parametrize("seed", [-1, 1 << 63, -(1 << 200) + 5, 10**300])
async def test_any_integer_is_a_seed(seed: int) -> None:
    harness = Harness()
    assert (await harness.complete(seed=seed)).status_code == 200
    assert harness.engine.requests[0].params.seed == seed % SEED_RANGE


async def test_without_a_seed_every_answer_draws_its_own() -> None:
    harness = Harness()
    await harness.complete(n=8)
    await harness.complete(n=8)
    seeds = [request.params.seed for request in harness.engine.requests]
    assert len(set(seeds)) == 16
    assert all(seed is not None and 0 <= seed < SEED_RANGE for seed in seeds)


async def test_max_tokens_left_out_is_16_or_what_there_is_room_for() -> None:
    harness = Harness()
    for length, expected in ((1, 16), (250, 6), (255, 1)):
        assert (await harness.complete(prompt=[5] * length)).status_code == 200
        assert harness.engine.requests[-1].params.max_tokens == expected


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(text: str) -> list[int]:
        raise AssertionError("tokenised")

    harness = Harness()
    monkeypatch.setattr(harness.state.tokenizer, "encode", encode)
    response = await harness.complete(prompt=["Hi", "fox " * 100_000])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_frees_its_row_while_others_go_on(stream: bool) -> None:
    harness = Harness(FakeEngine(script=None))
    task = asyncio.ensure_future(harness.complete(n=2, stop="fox", max_tokens=200, stream=stream))
    await until(lambda: bool(harness.engine.groups))
    (group,) = harness.engine.groups
    stops, goes_on = group.requests
    group.feed([Delta(request_id=stops.request_id, token_ids=tuple(tokenizer().encode("a fox and more")))])
    await until(lambda: bool(group.aborted))
    assert group.aborted == [stops.request_id]
    assert not task.done()
    group.feed(*([delta] for delta in reply_deltas(goes_on, "no such animal")))
    assert (await task).status_code == 200
    assert group.aborted == [stops.request_id]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["said", "naïve 漢", "d: n", "T"])
async def test_a_stop_string_ends_the_answer_and_frees_the_row(stop: str, stream: bool) -> None:
    def endless(request: GenerationRequest) -> list[Delta]:
        return [delta for delta in reply_deltas(request) if delta.finish_reason is None]

    harness = Harness(FakeEngine(endless))
    response = await harness.complete(stop=["absent", stop], max_tokens=200, stream=stream)
    if stream:
        *chunks, _ = events(response.text)
        choices = [chunk["choices"][0] for chunk in chunks]
        text, last = "".join(choice["text"] for choice in choices), choices[-1]
    else:
        last = response.json()["choices"][0]
        text = last["text"]
    assert text == REPLY[: REPLY.index(stop)]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)
    (group,) = harness.engine.groups
    assert group.aborted == [group.requests[0].request_id]


async def test_a_stop_token_is_named() -> None:
    def stops(request: GenerationRequest) -> list[Delta]:
        return [Delta(request_id=request.request_id, token_ids=(70, 71), finish_reason="stop", stop_reason=71)]

    choice = (await Harness(FakeEngine(stops)).complete(stop_token_ids=[71])).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 71)
    assert choice["text"] == tokenizer().decode([70])


async def test_streamed_answers_interleave_and_each_ends_once() -> None:
    lengths = {0: 3, 1: 20, 2: 9}

    def script(request: GenerationRequest) -> list[Delta]:
        assert request.params.seed is not None
        return reply_deltas(request, REPLY[: lengths[request.params.seed]])

    harness = Harness(FakeEngine(script))
    *chunks, _ = events((await harness.complete(n=3, seed=0, stream=True, max_tokens=200)).text)
    texts, ends = {0: "", 1: "", 2: ""}, []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["index"] not in ends, "a chunk after the last one"
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"] is not None:
            ends.append(choice["index"])
    assert texts == {index: REPLY[:length] for index, length in lengths.items()}
    assert ends == [0, 2, 1]


async def test_no_status_line_before_the_engine_accepted() -> None:
    harness = Harness()
    harness.engine.accepts.clear()
    async with harness.client() as client:
        task = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "Hi", "stream": True}))
        await harness.engine.submitted.wait()
        await asyncio.sleep(0.01)
        assert not task.done()
        harness.engine.accepts.set()
        assert (await task).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "type_", "param", "code"),
    [
        (EngineRejectedError("queue_full", "full"), 429, "rate_limit_error", None, "queue_full"),
        (EngineRejectedError("unavailable", "later"), 503, "service_unavailable_error", None, "unavailable"),
        (EngineUnavailableError("nobody"), 503, "service_unavailable_error", None, "unavailable"),
        (EngineRejectedError("invalid", "bad", "top_p"), 400, "invalid_request_error", "top_p", None),
    ],
)
async def test_what_the_engine_refuses(
    error: Exception, status: int, type_: str, param: str | None, code: str | None, stream: bool
) -> None:
    harness = Harness()
    harness.engine.refuse = error
    response = await harness.complete(n=2, stream=stream)
    assert response.status_code == status
    assert response.json() == {"error": {"message": str(error), "type": type_, "param": param, "code": code}}
    assert ("retry-after" in response.headers) == (status != 400)
    assert harness.count().counters["requests_total", "rejected"] == 2


async def test_no_model_yet() -> None:
    harness = Harness()
    harness.engine.info = None
    response = await harness.complete()
    assert response.status_code == 503
    assert response.headers["retry-after"]


async def test_a_drain_refuses_new_requests_and_finishes_open_ones() -> None:
    harness = Harness(FakeEngine(script=None))
    open_one = asyncio.ensure_future(harness.complete())
    await until(lambda: bool(harness.engine.groups))
    harness.state.service = ServiceState(healthy=True, engines_up=1, draining=True)
    refused = await harness.complete()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert refused.headers["retry-after"]
    (group,) = harness.engine.groups
    group.feed(*([delta] for delta in reply_deltas(group.requests[0])))
    assert (await open_one).status_code == 200


async def test_an_engine_that_dies_before_the_answer() -> None:
    harness = Harness(FakeEngine(script=None))
    task = asyncio.ensure_future(harness.complete())
    await until(lambda: bool(harness.engine.groups))
    harness.engine.die()
    response = await task
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert harness.count().counters["requests_total", "error"] == 1


async def test_an_engine_that_dies_within_a_stream() -> None:
    harness = Harness(FakeEngine(script=None))
    task = asyncio.ensure_future(harness.complete(stream=True, max_tokens=100))
    await until(lambda: bool(harness.engine.groups))
    (group,) = harness.engine.groups
    group.feed([reply_deltas(group.requests[0])[0]])
    harness.engine.die()
    response = await task
    assert response.status_code == 200
    first, error, done = events(response.text)
    assert first["choices"][0]["text"]
    assert error["error"]["type"] == "service_unavailable_error"
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_fails_fails_its_request_and_frees_the_others(stream: bool) -> None:
    harness = Harness(FakeEngine(script=None))
    task = asyncio.ensure_future(harness.complete(n=3, stream=stream))
    await until(lambda: bool(harness.engine.groups))
    (group,) = harness.engine.groups
    bad = group.requests[1].request_id
    group.feed([Delta(request_id=bad, finish_reason="error", error="non-finite logits")])
    response = await task
    if stream:
        error, done = events(response.text)
        assert done == "[DONE]"
    else:
        assert response.status_code == 500
        error = response.json()
    assert error["error"]["type"] == "server_error"
    assert error["error"]["message"].startswith("non-finite logits")
    assert sorted(group.aborted) == sorted(
        request.request_id for request in group.requests if request.request_id != bad
    )
    assert harness.count().counters["requests_total", "error"] == 3


async def test_a_fault_within_a_stream_is_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(FakeEngine(script=None))
    task = asyncio.ensure_future(harness.complete(stream=True))
    await until(lambda: bool(harness.engine.groups))
    harness.engine.groups[0].feed(RuntimeError("secret detail"))
    error, done = events((await task).text)
    assert done == "[DONE]"
    assert "secret" not in error["error"]["message"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert vars(record)["id"] in error["error"]["message"]


async def test_what_was_counted_agrees_with_the_answers() -> None:
    harness = Harness()
    usage = (await harness.complete(prompt=["Hi", "Ho ho"], n=2, max_tokens=200)).json()["usage"]
    *_, chunk, _ = events(
        (await harness.complete(stream=True, max_tokens=5, stream_options={"include_usage": True})).text
    )
    counted = harness.count()
    assert counted.counters["prompt_tokens_total",] == usage["prompt_tokens"] + chunk["usage"]["prompt_tokens"]
    generated = usage["completion_tokens"] + chunk["usage"]["completion_tokens"]
    assert counted.counters["generation_tokens_total",] == generated
    assert counted.sums["request_generation_tokens"] == generated
    assert (counted.counters["requests_total", "stop"], counted.counters["requests_total", "length"]) == (4, 1)
    for name in ("time_to_first_token_seconds", "request_latency_seconds", "request_decode_seconds",
                 "request_prompt_tokens", "request_queue_seconds", "request_prefill_seconds"):  # fmt: skip
        assert counted.observations[name] == 5, name
    assert counted.counters["http_requests_total", "/v1/completions", "POST", "200"] == 2


def cached_script(request: GenerationRequest) -> list[Delta]:
    """An engine that had 32 tokens of the prompt of request 100 in its cache, and all other prompts whole."""
    first, *others = reply_deltas(request)
    return [msgspec.structs.replace(first, cached_tokens=32 if request.request_id == 100 else 64), *others]


async def test_usage_tells_what_the_prefix_cache_held_of_each_prompt_once() -> None:
    """The answers to a prompt behind the first share what that one computes: they do not count."""
    harness = Harness(FakeEngine(cached_script))
    usage = (await harness.complete(prompt="x" * 65, n=3)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
    usage = (await harness.complete(prompt=["x" * 65, "y" * 65], n=2)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 128}


@pytest.mark.parametrize("stream_chunks", ["block", "token"])
async def test_streams_tell_cached_tokens_from_their_first_chunk_on(stream_chunks: str) -> None:
    harness = Harness(FakeEngine(cached_script), stream_chunks=stream_chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await harness.complete(prompt="x" * 65, stream=True, stream_options=options)
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in chunks] == [32] * len(chunks)


async def test_the_cache_salt_reaches_the_engine() -> None:
    harness = Harness()
    await harness.complete(n=2, cache_salt="tenant")
    await harness.complete(cache_salt=None)
    assert [request.cache_salt for request in harness.engine.requests] == ["tenant", "tenant", ""]
