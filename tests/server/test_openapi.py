"""The schema says what the server does: its ranges are those that are checked, and every answer is described."""

import json
from typing import Any

import pytest

from engine.types import MAX_LOGPROBS
from server.openapi import RANGES, gives, gives_text, takes
from server.protocol import CompletionRequest
from server.tokenization import DetokenizeRequest, TokenizeBody, TokenizeRequest
from tests.server.fakes import Harness


def body_of(operation: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["schema"]
    return schema


COMPLETION = body_of(takes(CompletionRequest))


async def document() -> dict[str, Any]:
    async with Harness().client() as client:
        told: dict[str, Any] = (await client.get("/openapi.json")).json()
    return told


def inside_and_outside() -> list[tuple[str, float, bool]]:
    """The ends of every range of numbers, and what lies just behind them; whether it is taken."""
    cases: list[tuple[str, float, bool]] = []
    for name, schema in RANGES.items():
        step = 1 if schema.get("type") == "integer" else 0.01
        if "minimum" in schema:
            cases += [(name, schema["minimum"], True), (name, schema["minimum"] - step, False)]
        if "maximum" in schema:
            cases += [(name, schema["maximum"], True), (name, schema["maximum"] + step, False)]
        if "exclusiveMinimum" in schema:
            cases += [(name, schema["exclusiveMinimum"] + 1e-6, True), (name, schema["exclusiveMinimum"], False)]
    return cases


@pytest.mark.parametrize(("name", "value", "taken"), inside_and_outside())
async def test_ranges_of_numbers_are_those_that_are_checked(name: str, value: float, taken: bool) -> None:
    # With echo, so that max_tokens may be 0.
    async with Harness().client() as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "echo": True, name: value})
    assert response.status_code == (200 if taken else 400), response.text
    if not taken:
        assert response.json()["error"]["param"] == name


def test_every_range_is_of_a_field() -> None:
    fields = set(COMPLETION["properties"]) | set(body_of(takes(DetokenizeRequest))["properties"])
    assert set(RANGES) <= fields


def test_optional_fields_may_be_null_and_required_ones_may_not() -> None:
    for name, field in COMPLETION["properties"].items():
        assert ({"type": "null"} in field["anyOf"]) == (name != "prompt"), name
        assert field.get("default", 0) is not None
    assert COMPLETION["required"] == ["prompt"]
    assert COMPLETION["additionalProperties"] == {"type": "null"}
    options = COMPLETION["properties"]["stream_options"]["anyOf"][0]
    assert options["properties"]["include_usage"]["anyOf"] == [{"type": "boolean"}, {"type": "null"}]
    assert body_of(takes(TokenizeRequest))["properties"]["prompt"]["type"] == "string"


async def test_null_is_taken_for_a_field_that_is_not_known() -> None:
    async with Harness().client() as client:
        answers = [
            await client.post("/v1/completions", json={"prompt": "Hi", "colour": None}),
            await client.post(
                "/v1/completions", json={"prompt": "Hi", "stream": True, "stream_options": {"colour": None}}
            ),
        ]
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_range_leaves_nothing_of_what_the_model_said() -> None:
    assert COMPLETION["properties"]["logprobs"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_LOGPROBS,
    }
    # What pydantic writes is no pattern of JSON schema.
    assert "\\z" not in json.dumps(COMPLETION)


def test_a_stream_is_events_that_are_answers_errors_or_the_end() -> None:
    content = gives(TokenizeBody, stream=True)[200]["content"]
    data = content["text/event-stream"]["schema"]["properties"]["data"]
    answer, error = data["else"]["contentSchema"]["anyOf"]
    assert data["if"] == {"const": "[DONE]"}
    assert answer == content["application/json"]["schema"]
    assert error["required"] == ["error"]


def test_text_is_text() -> None:
    assert gives_text("text/csv")[200]["content"] == {"text/csv": {"schema": {"type": "string"}}}


async def test_every_operation_says_what_it_answers() -> None:
    told = await document()
    # References of a schema on its own would lead nowhere.
    assert "$ref" not in json.dumps(told)
    for path, methods in told["paths"].items():
        for operation in methods.values():
            answers = operation["responses"]
            assert {"200", "4XX", "429", "500", "503"} == set(answers), path
            assert all(one["content"] for one in answers.values())
            assert answers["503"]["headers"]["Retry-After"]["required"]
    assert set(told["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {
        "text/plain",
        "application/openmetrics-text",
    }
