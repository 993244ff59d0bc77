"""The output of a batch, and how a run goes on with that of an earlier one."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.batch.ask import Answer
from server.batch.results import OutputError, continue_output, new_errors

GOOD = Answer(200, "r1", b'{"id": "cmpl-r1"}')
BAD = Answer(400, "r2", b'{"error": {}}')


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_answer_is_a_line_in_the_format_of_batches(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with continue_output(path) as (results, answered):
        assert answered == set()
        results.write("a", GOOD)
        # In the file at once, not only at the end.
        (line,) = lines(path)
    assert line.pop("id").startswith("batch_req_")
    response = {"status_code": 200, "request_id": "r1", "body": {"id": "cmpl-r1"}}
    assert line == {"custom_id": "a", "response": response, "error": None}


def test_a_run_goes_on_behind_the_last_whole_answer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with continue_output(path) as (results, _):
        results.write("a", GOOD)
        results.write("b", GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 4])
    with continue_output(path) as (results, answered):
        assert answered == {"a", "b"}
        assert path.read_bytes() == whole
        results.write("c", GOOD)
    assert [line["custom_id"] for line in lines(path)] == ["a", "b", "c"]


def test_what_was_refused_elsewhere_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with continue_output(path) as (results, _):
        results.write("a", BAD)
        results.write("b", GOOD)
    with continue_output(path) as (_, answered):
        assert answered == {"b"}


@pytest.mark.parametrize("content", [b"some text\n", b'{"custom_id": 3}\n', b"[]\n"])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content + b"a last line without an end")
    with pytest.raises(OutputError, match=r"out\.jsonl:1 is no result of a batch"), continue_output(path):
        pass
    assert path.read_bytes() == content + b"a last line without an end"


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with continue_output(path), pytest.raises(OutputError, match="another run"), continue_output(path):
        pass
    with continue_output(path):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "out.jsonl"
    with pytest.raises(OutputError, match=f"cannot write {path}"), continue_output(path):
        pass


def test_errors_are_those_of_the_last_run(tmp_path: Path) -> None:
    path = tmp_path / "errors.jsonl"
    path.write_text("of an earlier run\n")
    with new_errors(path) as errors:
        assert errors is not None
        errors.write_unread(7, "it is not valid JSON")
        errors.write("c", BAD)
    unread, refused = lines(path)
    assert (unread["custom_id"], unread["response"]) == (None, None)
    assert unread["error"] == {"code": "invalid_line", "message": "line 7: it is not valid JSON"}
    assert (refused["custom_id"], refused["response"]["status_code"], refused["error"]) == ("c", 400, None)
    with new_errors(None) as errors:
        assert errors is None
