"""What is a request, and what a line that is none is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.batch.lines import LineError, parse_line, survey, unanswered


def line(custom_id: object = "a", **fields: Any) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}, **fields}
    return json.dumps({name: value for name, value in whole.items() if value is not None}).encode() + b"\n"


def test_the_body_is_kept_as_it_is() -> None:
    text = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{ "prompt" : "\\u00e9", "n":1, "n":2}}'
    request = parse_line(text)
    assert request.custom_id == "a"
    assert bytes(request.body) == b'{ "prompt" : "\\u00e9", "n":1, "n":2}'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"nonsense", "not valid JSON"),
        (b'{"custom_id": "a"', "not valid JSON"),
        (b'{"custom_id": "\xff", "method": "POST"}', "not valid JSON"),
        (b"[]", "object"),
        (line(None), "custom_id"),
        (line(7), "custom_id"),
        (line(""), "custom_id is empty"),
        (line(method=None), "method"),
        (line(method="GET"), 'method has to be POST, not "GET"'),
        (line(url=None), "url"),
        (line(url="/v1/chat/completions"), 'url has to be /v1/completions, not "/v1/chat/completions"'),
        (line(body=None), "body"),
        (line(more=1), "more"),
    ],
)
def test_what_is_wrong_with_a_line(text: bytes, named: str) -> None:
    with pytest.raises(LineError) as failure:
        parse_line(text)
    assert named in str(failure.value)


def test_a_survey_finds_what_is_left_and_what_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        line("a") + b"\n" + line("b") + b"nonsense\n" + line("a") + b"  \r\n" + line("c").rstrip()  # no end of line
    )
    found = survey(path, {"b", "not here"})
    assert (found.left, found.answered, sorted(found.bad)) == (2, 1, [4, 5])
    assert found.bad[5] == 'custom_id "a" is that of line 1'
    left = list(unanswered(path, {"b"}, found.bad))
    assert [(one.number, one.request.custom_id) for one in left] == [(1, "a"), (7, "c")]
