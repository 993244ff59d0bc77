"""docs/api.md names exactly the fields that the server takes, with their defaults, and its examples are requests."""

import json
import re

import msgspec
import pytest

from docs.generate import DOCS
from server.protocol import UNSUPPORTED_FIELDS, CompletionBody, CompletionRequest, parse_completion_request

TEXT = (DOCS / "api.md").read_text(encoding="utf-8")
FIELDS = TEXT.split("## Fields of")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"^```json\n(.*?)^```$", TEXT.split("## Examples")[1], re.MULTILINE | re.DOTALL)


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


def test_unsupported_fields_are_named() -> None:
    unsupported = FIELDS.split("not supported yet:")[1]
    assert set(UNSUPPORTED_FIELDS) <= set(re.findall(r"`(\w+)`", unsupported))


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_requests(example: str) -> None:
    parse_completion_request(json.loads(example))


def test_the_answer_is_an_answer() -> None:
    answer = re.findall(r"^```json\n(.*?)^```$", TEXT.split("## Answers")[1], re.MULTILINE | re.DOTALL)[0]
    body = msgspec.json.decode(answer.encode(), type=CompletionBody)
    assert set(json.loads(answer)["choices"][0]) == set(msgspec.to_builtins(body)["choices"][0])
