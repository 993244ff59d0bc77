"""Starts of a tiny model: in this process, and one in a process of its own."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.model_files import write_model
from benchmarks.models import BenchmarkModel
from benchmarks.startup import drop_from_file_cache, measure_model, parse, show, start_once
from benchmarks.startup_child import start
from engine.config import ModelConfig
from engine.process_config import EngineOptions
from tests.benchmarks.tiny import MODEL, VANILLA

LINE = ["--device", "cpu", "--dtype", "bfloat16", "--max-step-positions", "32", "--repeats", "1"]
OPTIONS = EngineOptions(device="cpu", max_rows=4)


@pytest.mark.parametrize("model", [MODEL, VANILLA], ids=["block", "vanilla"])
def test_the_parts_of_a_start_add_up(model: BenchmarkModel, tmp_path: Path) -> None:
    write_model(model, tmp_path, "bfloat16")
    drop_from_file_cache(tmp_path)
    before = time.monotonic()
    found = start(tmp_path, OPTIONS)
    assert before <= found.imported < found.first_token <= time.monotonic()
    assert found.parts.keys() == {"weights", "rehearsal", "graphs", "other", "first token"}
    assert sum(found.parts.values()) == pytest.approx(found.first_token - found.imported)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert ModelConfig.load(tmp_path) == model.config.model_copy(update={"dtype": "bfloat16"})


def test_rows_have_the_form_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches, seconds = [], iter((9.0, 3.0))

    def fake(directory: Path, options: EngineOptions, triton_cache: Path) -> dict[str, object]:
        assert (directory / "config.json").is_file()
        caches.append(triton_cache)
        return {"device": "cpu", "seconds_to_first_token": next(seconds), "parts": {"imports": 1.0, "weights": 2.0}}

    monkeypatch.setattr("benchmarks.startup.start_once", fake)
    rows = measure_model(MODEL, parse([*LINE, "--directory", str(tmp_path)]))
    assert [(row["triton_cache"], row["seconds_to_first_token"]) for row in rows] == [("empty", 9.0), ("warm", 3.0)]
    assert caches[0] == caches[1]
    assert list(tmp_path.iterdir()) == []
    json.dumps(rows)
    show(rows)
    assert "imports" in capsys.readouterr().out


def test_a_fresh_process_starts(tmp_path: Path) -> None:
    write_model(MODEL, tmp_path, "float32")
    found = start_once(tmp_path, OPTIONS, tmp_path / "triton")
    assert found["device"] == "cpu"
    assert 0 < found["parts"]["imports"] < found["seconds_to_first_token"]
    assert sum(found["parts"].values()) == pytest.approx(found["seconds_to_first_token"], abs=0.01)


def test_a_process_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot read"):
        start_once(tmp_path, OPTIONS, tmp_path / "triton")
