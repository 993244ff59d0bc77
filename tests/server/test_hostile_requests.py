"""One bad request for each rule and limit, with the status and the `param` it gets. None of them reaches the engine."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from engine.types import MAX_STOP_TOKEN_IDS
from server.protocol import CompletionRequest
from tests.server.fakes import Harness

NAN, INFINITY = float("nan"), float("inf")

BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", [[1], []], "prompt"),
    ("prompt", 7, "prompt"),
    ("prompt", True, "prompt"),
    ("prompt", {"text": "Hi"}, "prompt"),
    ("prompt", [1, "two"], "prompt"),
    ("prompt", [1, True], "prompt"),
    ("prompt", [1.0], "prompt"),
    ("prompt", [None], "prompt"),
    ("prompt", [[1], "two"], "prompt"),
    ("prompt", [[1], [True]], "prompt"),
    ("prompt", [[1], [[2]]], "prompt"),
    ("prompt", [-1], "prompt"),
    ("prompt", [320], "prompt"),
    ("prompt", [[1], [1 << 70]], "prompt"),
    ("prompt", [5] * 256, "prompt"),
    ("prompt", "fox " * 300, "prompt"),
    ("prompt", "\ud800", "prompt"),
    ("prompt", ["fine", "\udfff x"], "prompt"),
    ("prompt", [[1]] * 1025, "prompt"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 256, "max_tokens"),
    ("max_tokens", 1 << 80, "max_tokens"),
    ("max_tokens", 1.0, "max_tokens"),
    ("max_tokens", "16", "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_tokens", [16], "max_tokens"),
    ("max_tokens", {}, "max_tokens"),
    ("temperature", -0.1, "temperature"),
    ("temperature", 2.1, "temperature"),
    ("temperature", "1", "temperature"),
    ("temperature", True, "temperature"),
    ("temperature", 10**400, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.01, "top_p"),
    ("top_p", -0.5, "top_p"),
    ("top_p", "1", "top_p"),
    ("top_k", -2, "top_k"),
    ("top_k", 1.5, "top_k"),
    ("top_k", 1 << 40, "top_k"),
    ("min_p", -0.01, "min_p"),
    ("min_p", 1.01, "min_p"),
    ("min_p", True, "min_p"),
    ("seed", 1.5, "seed"),
    ("seed", "7", "seed"),
    ("seed", True, "seed"),
    ("n", 0, "n"),
    ("n", -1, "n"),
    ("n", 1025, "n"),
    ("n", 1 << 90, "n"),
    ("n", "2", "n"),
    ("best_of", 2, "best_of"),
    ("best_of", "1", "best_of"),
    ("stop", "", "stop"),
    ("stop", ["a", ""], "stop"),
    ("stop", 1, "stop"),
    ("stop", [1], "stop"),
    ("stop", {"a": 1}, "stop"),
    ("stop", ["x"] * 17, "stop"),
    ("stop", "x" * 1025, "stop"),
    ("stop", "\ud800", "stop"),
    ("stop_token_ids", 1, "stop_token_ids"),
    ("stop_token_ids", [320], "stop_token_ids"),
    ("stop_token_ids", [-1], "stop_token_ids"),
    ("stop_token_ids", ["1"], "stop_token_ids"),
    ("stop_token_ids", [True], "stop_token_ids"),
    ("stop_token_ids", [1] * (MAX_STOP_TOKEN_IDS + 1), "stop_token_ids"),
    ("ignore_eos", 1, "ignore_eos"),
    ("ignore_eos", "true", "ignore_eos"),
    ("min_tokens", -1, "min_tokens"),
    ("min_tokens", 17, "min_tokens"),
    ("min_tokens", 0.5, "min_tokens"),
    ("stream", "yes", "stream"),
    ("stream", 1, "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("stream_options", [], "stream_options"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
    ("stream_options", {"continuous_usage_stats": 1}, "stream_options.continuous_usage_stats"),
    ("stream_options", {"continuous_usage_stats": True}, "stream_options"),
    ("stream_options", {"unheard_of": 1}, "stream_options.unheard_of"),
    ("model", 5, "model"),
    ("suffix", "end", "suffix"),
    ("suffix", 0, "suffix"),
    ("priority", 1 << 31, "priority"),
    ("priority", -(1 << 31) - 1, "priority"),
    ("priority", 0.5, "priority"),
    ("priority", "high", "priority"),
    ("cache_salt", "", "cache_salt"),
    ("cache_salt", "x" * 257, "cache_salt"),
    ("cache_salt", 7, "cache_salt"),
    ("user", 5, "user"),
    ("user", "x" * 257, "user"),
    ("request_id", 5, "request_id"),
    ("request_id", "two words", "request_id"),
    ("request_id", "line\r\nSet-Cookie: x", "request_id"),
    ("request_id", "ends\n", "request_id"),
    ("request_id", "", "request_id"),
    ("request_id", "x" * 129, "request_id"),
    ("unheard_of", 1, "unheard_of"),
    ("Prompt", "Hi", "Prompt"),
    ("messages", [], "messages"),
    ("echo", 0, "echo"),
    ("echo", "true", "echo"),
    ("logprobs", 1.5, "logprobs"),
    ("logprobs", "1", "logprobs"),
    ("logprobs", 21, "logprobs"),
    ("logprobs", -1, "logprobs"),
    ("logprobs", True, "logprobs"),
    ("prompt_logprobs", 21, "prompt_logprobs"),
    ("prompt_logprobs", -1, "prompt_logprobs"),
    ("prompt_logprobs", True, "prompt_logprobs"),
    ("prompt_logprobs", 1.0, "prompt_logprobs"),
    ("presence_penalty", -2.1, "presence_penalty"),
    ("presence_penalty", False, "presence_penalty"),
    ("presence_penalty", 2.1, "presence_penalty"),
    ("presence_penalty", "0", "presence_penalty"),
    ("frequency_penalty", True, "frequency_penalty"),
    ("frequency_penalty", 10**400, "frequency_penalty"),
    ("frequency_penalty", -2.1, "frequency_penalty"),
    ("repetition_penalty", "1", "repetition_penalty"),
    ("repetition_penalty", True, "repetition_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("repetition_penalty", -1, "repetition_penalty"),
    ("logit_bias", {"5": 101}, "logit_bias"),
    ("logit_bias", {"5": -100.5}, "logit_bias"),
    ("logit_bias", {"5": "1"}, "logit_bias"),
    ("logit_bias", {"5": True}, "logit_bias"),
    ("logit_bias", {"5": None}, "logit_bias"),
    ("logit_bias", {"5": [1]}, "logit_bias"),
    ("logit_bias", {"05": 1}, "logit_bias"),
    ("logit_bias", {"5 ": 1}, "logit_bias"),
    ("logit_bias", {"٥": 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"9" * 5000: 1}, "logit_bias"),
    ("logit_bias", {str(token): 1 for token in range(301)}, "logit_bias"),
    ("logit_bias", [], "logit_bias"),
    ("logit_bias", {"320": 1}, "logit_bias"),
    ("logit_bias", {"fox": 1}, "logit_bias"),
    ("include_stop_str_in_output", 1, "include_stop_str_in_output"),
    ("include_stop_str_in_output", "yes", "include_stop_str_in_output"),
    ("skip_special_tokens", 0, "skip_special_tokens"),
    ("add_special_tokens", 0, "add_special_tokens"),
    ("truncate_prompt_tokens", 0, "truncate_prompt_tokens"),
    ("truncate_prompt_tokens", -2, "truncate_prompt_tokens"),
    ("truncate_prompt_tokens", 1.5, "truncate_prompt_tokens"),
    ("truncate_prompt_tokens", "5", "truncate_prompt_tokens"),
    ("truncate_prompt_tokens", True, "truncate_prompt_tokens"),
    ("return_token_ids", 1, "return_token_ids"),
]

BAD_BODIES: list[tuple[str, bytes, int, str | None]] = [
    ("nothing", b"", 400, None),
    ("not JSON", b"prompt=Hi", 400, None),
    ("cut off", b'{"prompt": "Hi', 400, None),
    ("two values", b'{"prompt": "Hi"} {}', 400, None),
    ("a list", b'["prompt"]', 400, None),
    ("a string", b'"prompt"', 400, None),
    ("null", b"null", 400, None),
    ("no prompt", b"{}", 400, "prompt"),
    ("NaN", b'{"prompt": "Hi", "temperature": NaN}', 400, None),
    ("Infinity", b'{"prompt": "Hi", "temperature": Infinity}', 400, None),
    ("-Infinity", b'{"prompt": "Hi", "logit_bias": {"1": -Infinity}}', 400, None),
    ("a number beyond floats", b'{"prompt": "Hi", "temperature": 1e999}', 400, "temperature"),
    ("a number of 5000 digits", b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}", 400, None),
    ("Latin-1", '{"prompt": "é"}'.encode("latin-1"), 400, None),
    ("UTF-16", '{"prompt": "Hi"}'.encode("utf-16"), 400, None),
    ("a byte order mark", b"\xef\xbb\xbf" + b'{"prompt": "Hi"}', 400, None),
    ("a control character", b'{"prompt": "H\x01i"}', 400, None),
    ("a key twice", b'{"prompt": "Hi", "n": 1, "n": 2}', 400, None),
    ("a key twice inside", b'{"prompt": "Hi", "stream_options": {"a": 1, "a": 2}}', 400, None),
    ("deep lists", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, None),
    ("lists below the recursion limit", b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "prompt"),
    ("half a surrogate in a key", b'{"prompt": "Hi", "\\ud800": 1}', 400, "\\ud800"),
    ("half a surrogate deep inside", b'{"prompt": "Hi", "logit_bias": {"a": ["\\udc00"]}}', 400, "logit_bias"),
    ("too large", b'{"prompt": "' + b"x" * 5000 + b'"}', 413, None),
]


def test_every_field_is_in_the_table() -> None:
    assert set(CompletionRequest.model_fields) <= {field for field, _, _ in BAD_FIELDS}


@pytest.mark.parametrize("field", sorted(set(CompletionRequest.model_fields) - {"prompt"}))
async def test_null_is_what_a_field_left_out_is(field: str) -> None:
    harness = Harness()
    assert (await harness.complete(seed=1, **({field: None} if field != "seed" else {}))).status_code == 200
    assert (await harness.complete(seed=1)).status_code == 200
    first, second = harness.engine.requests
    assert (first.params, first.priority, first.prompt_token_ids) == (
        second.params, second.priority, second.prompt_token_ids,
    )  # fmt: skip


def is_envelope(body: Any) -> bool:
    """Whether this is an error as every client expects it."""
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("field", "value", "param"), BAD_FIELDS, ids=lambda value: repr(value)[:30])
async def test_bad_fields(field: str, value: Any, param: str) -> None:
    harness = Harness()
    body = json.dumps({"prompt": "Hi", field: value}).encode()
    async with harness.client() as client:
        response = await client.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text
    assert is_envelope(response.json())
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(error["message"]) < 400
    assert harness.engine.groups == []
    assert "requests_total" not in {name for name, *_ in harness.count().counters}


@pytest.mark.parametrize(
    ("body", "status", "param"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES]
)
async def test_bad_bodies(body: bytes, status: int, param: str | None) -> None:
    harness = Harness(max_body_bytes=1 << 20 if status == 400 else 4096)
    async with harness.client() as client:
        response = await client.post("/v1/completions", content=body)
    assert response.status_code == status, response.text
    assert is_envelope(response.json())
    assert response.json()["error"]["param"] == param
    assert harness.engine.groups == []


async def test_an_escaped_pair_of_surrogates_is_a_character() -> None:
    harness = Harness()
    async with harness.client() as client:
        response = await client.post(
            "/v1/completions", content=b'{"prompt": "\\ud83d\\ude00", "stop": ["\\uD83D\\uDE01"]}'
        )
    assert response.status_code == 200


async def test_fan_out_counts_prompts_times_n() -> None:
    harness = Harness(max_choices=6)
    assert (await harness.complete(prompt=["a", "b", "c"], n=2)).status_code == 200
    response = await harness.complete(prompt=["a", "b", "c"], n=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


async def test_the_limits_are_the_operators() -> None:
    limits: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
        ({"max_choices": 2}, {"n": 2}, {"n": 3}, "n"),
        ({"max_choices": 2}, {"prompt": ["a", "b"]}, {"prompt": ["a", "b", "c"]}, "prompt"),
        ({"max_stop_strings": 2}, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop"),
    ]
    for limit, fits, exceeds, param in limits:
        assert (await Harness(**limit).complete(**fits)).status_code == 200
        refused = await Harness(**limit).complete(**exceeds)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_the_defaults_of_the_limits() -> None:
    assert (await Harness().complete(n=1024)).status_code == 200
    assert (await Harness().complete(prompt=[[5]] * 512, n=2)).status_code == 200
    assert (await Harness().complete(stop=["x"] * 16)).status_code == 200
    assert (await Harness().complete(prompt=[5] * 200, max_tokens=56)).status_code == 200
    assert (await Harness().complete(prompt=[5] * 200, max_tokens=57)).status_code == 400


async def test_the_message_says_which_of_several_prompts_is_at_fault() -> None:
    error = (await Harness().complete(prompt=[[1], [2], [320]])).json()["error"]
    assert "prompt 2" in error["message"]
    assert "320" in error["message"]


async def test_an_unknown_model() -> None:
    response = await Harness().complete(model="gpt-\ufffd")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert response.json()["error"]["code"] == "model_not_found"


async def test_compressed_bodies_are_refused_by_name() -> None:
    async with Harness().client() as client:
        response = await client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert is_envelope(response.json())


JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(max_size=20),
    lambda inner: (
        strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = sorted({*CompletionRequest.model_fields, "unheard_of"})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.dictionaries(strategies.sampled_from(NAMES), JSON, max_size=6))
async def test_no_object_makes_the_server_fail(fields: dict[str, Any]) -> None:
    harness = Harness()
    async with harness.client() as client:
        response = await client.post("/v1/completions", content=json.dumps({"prompt": "Hi", **fields}).encode())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert is_envelope(response.json())


@settings(max_examples=150, deadline=None)
@given(strategies.binary(max_size=60))
async def test_no_bytes_make_the_server_fail(body: bytes) -> None:
    async with Harness().client() as client:
        response = await client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert is_envelope(response.json())
