"""docs/api.md names exactly the fields that the server takes, with their defaults, and its examples do what it says."""

import json
import re
from functools import cache
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from starlette.routing import Route

from docs.generate import DOCS
from engine.config import ModelConfig
from engine.model_files import DEFAULT_MODEL, find_model
from engine.tokenizer import Tokenizer
from server.protocol import CompletionBody, CompletionRequest
from tests.server.fakes import INFO, Harness, events

TEXT = (DOCS / "api.md").read_text(encoding="utf-8")
FIELDS = TEXT.split("## Fields of")[1].split("\n## ")[0]


class Example(NamedTuple):
    """A request of the page, and the answer below it, if there is one."""

    method: str
    path: str
    body: str
    answer: str


EXAMPLES = [
    Example(*found)
    for found in re.findall(
        r"^```http\n(GET|POST) (\S+)\n(?:\n(.*?)\n)?```\n(?:\n```json\n(.*?)\n```)?",
        TEXT.split("## Examples")[1],
        re.MULTILINE | re.DOTALL,
    )
]


@cache
def embedded_tokenizer() -> Tokenizer:
    return Tokenizer.load(find_model(None))


async def send(example: Example) -> httpx.Response:
    """The answer of a server that has the embedded model's name, sizes and tokenizer, and another's engine."""
    model = ModelConfig.load(find_model(None))
    harness = Harness(spoken=embedded_tokenizer(), served_model_name=(DEFAULT_MODEL,))
    harness.engine.info = msgspec.structs.replace(
        INFO, vocab_size=model.vocab_size, max_length=model.max_length, eos_token_id=model.eos_token_id
    )
    async with harness.client() as client:
        return await client.request(example.method, example.path, content=example.body.encode())


def documented_fields() -> dict[str, str]:
    """Field and default, from the table."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", FIELDS, re.MULTILINE)
    return {name: default.strip() for name, default in rows}


def test_the_table_has_every_field() -> None:
    assert set(documented_fields()) == set(CompletionRequest.model_fields)


def test_the_defaults_are_those_of_the_server() -> None:
    documented = documented_fields()
    wrong = {}
    for name, field in CompletionRequest.model_fields.items():
        if isinstance(field.default, bool | int | float) and not field.is_required():
            value = json.loads(documented[name])
            if value != field.default or isinstance(value, bool) != isinstance(field.default, bool):
                wrong[name] = value
    assert wrong == {}


def test_every_example_is_found() -> None:
    assert len(EXAMPLES) == TEXT.count("```http") > 0
    assert sum(bool(example.answer) for example in EXAMPLES) == TEXT.split("## Examples")[1].count("```json")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.path} {example.body[:40]}")
async def test_an_example_is_answered_as_the_page_says(example: Example) -> None:
    response = await send(example)
    expected = json.loads(example.answer) if example.answer else {}
    assert response.status_code == (400 if "error" in expected else 200), response.text
    if expected:
        assert stable(response.json()) == stable(expected)
    elif json.loads(example.body).get("stream"):
        assert events(response.text)[-1] == "[DONE]"


def stable(body: dict[str, Any]) -> dict[str, Any]:
    """Without what is another with every answer."""
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def test_every_field_is_in_an_example() -> None:
    bodies = [json.loads(example.body) for example in EXAMPLES if example.path == "/v1/completions"]
    assert {name for body in bodies for name in body} == set(CompletionRequest.model_fields)
    options = {name for body in bodies for name in body.get("stream_options", ())}
    assert options == {"include_usage", "continuous_usage_stats"}


def test_every_endpoint_is_in_the_first_table() -> None:
    documented = set(re.findall(r"`(GET|POST) (\S+)`", TEXT.split("## Fields of")[0]))
    routes = [route for route in Harness().app.routes if isinstance(route, Route)]
    served = {
        (method, route.path.replace("{model_id:path}", "{id}"))
        for route in routes
        for method in route.methods or ()
        if method != "HEAD" and route.path != "/openapi.json"
    }
    assert documented == served


def test_the_answer_is_an_answer() -> None:
    answer = re.findall(r"^```json\n(.*?)^```$", TEXT.split("## Answers")[1], re.MULTILINE | re.DOTALL)[0]
    body = msgspec.json.decode(answer.encode(), type=CompletionBody)
    assert set(json.loads(answer)["choices"][0]) == set(msgspec.to_builtins(body)["choices"][0])
