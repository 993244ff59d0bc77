"""`blockserve batch` as a whole process, with an engine of its own, beside what the server answers."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.server_process import ServerProcess, wait_until

pytestmark = pytest.mark.serving

BODIES: dict[str, dict[str, Any]] = {
    "sampled": {"prompt": "Once upon a time", "max_tokens": 40, "seed": 3},
    "several": {"prompt": ["One day", "The cat"], "max_tokens": 12, "n": 2, "seed": 5, "stop": "."},
    "scored": {"prompt": "The dog ran", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True},
}


def write_input(path: Path, bodies: dict[str, dict[str, Any]]) -> None:
    common = {"method": "POST", "url": "/v1/completions"}
    path.write_text("".join(json.dumps({"custom_id": i, **common, "body": body}) + "\n" for i, body in bodies.items()))


def start(source: Path, output: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server.cli", "batch", str(source), "-o", str(output), "--device", "cpu"]
    with log.open("wb") as errors:
        return subprocess.Popen([*command, *arguments], stderr=errors)


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of an output that may be being written; fails if two have one id."""
    text = path.read_bytes() if path.exists() else b""
    lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["response"] for line in lines}


def test_answers_are_those_of_a_server(server: ServerProcess, tmp_path: Path) -> None:
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    bodies = {**BODIES, "refused": {"prompt": "x", "max_tokens": 0}, "far": {"prompt": [[1 << 30]]}}
    write_input(source, bodies)
    assert start(source, output, log).wait(60) == 1
    answers = results(output)
    assert answers.keys() == BODIES.keys()
    for name, body in BODIES.items():
        served = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        assert answers[name]["status_code"] == 200
        for choice, same in zip(answers[name]["body"]["choices"], served["choices"], strict=True):
            ours, theirs = choice.pop("logprobs"), same.pop("logprobs")
            assert choice == same
            # Products of other batches round in another way.
            assert ours == theirs or ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-4)
    told = log.read_text()
    assert f"{source}:4: max_tokens" in told
    assert f"{source}:5: " in told
    assert told.endswith("3 answered, 0 answered before, 2 skipped\n")


def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    body = {"prompt": "Once upon a time", "ignore_eos": True}
    write_input(source, {f"r{i}": {**body, "max_tokens": 40 + 4 * i, "seed": i} for i in range(24)})
    first = start(source, output, log, "--max-rows", "4")
    wait_until(lambda: len(results(output)) >= 4, what="the first answers")
    first.kill()
    first.wait()
    before = results(output)
    assert 4 <= len(before) < 24
    with output.open("ab") as file:
        file.write(b'{"id": "batch_req_of a line that was not finis')
    # What is left of the first run may still write to its own log.
    log = tmp_path / "log of the second"
    assert start(source, output, log).wait(120) == 0
    after = results(output)
    assert len(after) == 24
    assert {name: after[name] for name in before} == before
    assert log.read_text() == f"{24 - len(before)} answered, {len(before)} answered before, 0 skipped\n"


def test_an_engine_that_dies_costs_no_answer(tmp_path: Path) -> None:
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    body = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 120}
    write_input(source, {f"r{i}": {**body, "seed": i} for i in range(12)})
    run = start(source, output, log, "--max-rows", "4", "--log-level", "info")
    wait_until(lambda: len(results(output)) >= 2, what="the first answers")
    os.kill(int(re.findall(r"engine 0 starts pid=(\d+)", log.read_text())[-1]), signal.SIGKILL)
    assert run.wait(120) == 0
    assert {answer["status_code"] for answer in results(output).values()} == {200}
    assert len(results(output)) == 12
    assert "was killed by SIGKILL" in log.read_text()


def test_ctrl_c_leaves_what_is_answered_and_says_what_is_left(tmp_path: Path) -> None:
    source, output, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    body = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 400}
    write_input(source, {f"r{i}": {**body, "seed": i} for i in range(30)})
    run = start(source, output, log, "--max-rows", "2")
    wait_until(lambda: len(results(output)) >= 1, what="the first answer")
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    done = len(results(output))
    assert f"{done} answered, 0 answered before, 0 skipped, {30 - done} left: run the same command" in log.read_text()
