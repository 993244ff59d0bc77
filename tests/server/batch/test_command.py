"""The command as far as it goes without an engine."""

import json
from pathlib import Path

import pytest

from server import cli
from tests.server.batch.test_lines import line


def answered(custom_id: str) -> str:
    return json.dumps({"custom_id": custom_id, "response": {"status_code": 200}}) + "\n"


def test_what_is_answered_already_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("a") + line("b"))
    output.write_text(answered("b") + answered("a"))
    before = output.read_bytes()
    assert cli.main(["batch", str(source), "-o", str(output), "--model", "/no/such/model"]) == 0
    assert capsys.readouterr().err == "0 answered, 2 answered before, 0 skipped\n"
    assert output.read_bytes() == before


def test_bad_lines_are_told_by_number_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output, errors = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "errors.jsonl"))
    source.write_bytes(line("a") + b"nonsense\n" * 30)
    output.write_text(answered("a"))
    assert cli.main(["batch", str(source), "-o", str(output), "--errors", str(errors)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"{source}:2: it is not valid JSON")
    assert told[-2] == "more lines were skipped; --errors FILE keeps the reason of each"
    assert told[-1] == "0 answered, 1 answered before, 30 skipped"
    assert len(told) == 22
    assert len(errors.read_text().splitlines()) == 30


def test_what_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for arguments, named in (
        ([str(source), "-o", str(output)], f"cannot read {source}"),
        ([str(source), "-o", str(source)], "different files"),
        ([str(source), "-o", str(output), "--errors", str(output)], "different files"),
        ([str(source), "-o", str(tmp_path)], f"cannot write {tmp_path}"),
        ([str(source), "-o", str(output), "--max-rows", "0"], "--max-rows"),
    ):
        assert cli.main(["batch", *arguments]) == 2
        err = capsys.readouterr().err
        assert named in err
        assert err.count("\n") == 1
    for other in (str(tmp_path), "/dev/null"):
        assert cli.main(["batch", other, "-o", str(output)]) == 2
        assert f"{other} is no regular file" in capsys.readouterr().err
    source.write_bytes(line("a"))
    assert cli.main(["batch", str(source), "-o", str(output), "--model", "/no/such/model"]) == 2
    assert "there is no directory /no/such/model" in capsys.readouterr().err
