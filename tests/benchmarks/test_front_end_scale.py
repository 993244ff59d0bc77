"""A row for each number of API processes and each way, of a real server."""

import json
from pathlib import Path

import pytest

from benchmarks import front_end_scale, model_files
from benchmarks.front_end_scale import main, parse
from benchmarks.models import BenchmarkModel
from engine.config import ModelConfig
from tests.benchmarks.tiny import MODEL
from tests.repository import ROOT

TOKENIZER = ROOT / "engine" / "default_model" / "tokenizer.json"
SHORT = ["--open", "2", "--workers", "1", "--seconds", "2", "--warm-up", "0.5", "--prompt-tokens", "8"]


def test_rows_have_the_engines_share_and_the_clients_ceiling(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    vocabulary = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    tiny = MODEL.config.model_copy(update={"vocab_size": len(vocabulary) + 64})
    for module in (front_end_scale, model_files):
        monkeypatch.setattr(module, "MODELS", {"tiny": BenchmarkModel("tiny", tiny, rows=2, floors={})})
    # The engine alone is measured by a process of its own, which knows no tiny shape.
    monkeypatch.setattr(front_end_scale, "engine_alone", lambda name, rows, device: 1000.0 * rows)
    monkeypatch.setattr(front_end_scale, "CEILING", ["--ceiling", "--seconds", "0.5", "--warm-up", "0.2"])
    monkeypatch.setattr(front_end_scale, "parse", lambda: parse([*LINE, "--no-results"]))
    main()
    captured = capfd.readouterr()
    rows = json.loads(captured.out.splitlines()[-1])["rows"]
    assert [(row["api_processes"], row["streamed"]) for row in rows] == [(2, False), (2, True)]
    for row in rows:
        assert row["answers"] > 0
        assert row["failures"] == 0
        assert row["ceiling_tok_s"] > row["tok_s"] > 0
        # Within 2 s a counter that is a quarter of a second old may be an eighth off, and the machine is busy.
        assert row["server_tok_s"] == pytest.approx(row["tok_s"], rel=0.35)
        assert row["engine_share"] == row["server_tok_s"] / 2000
        assert row["idle_ttft_ms"] > 0
        assert row["idle_prompt_tokens"] == tiny.max_length - 4
        assert {"commit", "torch", "date"} <= row.keys()
        assert f"{row['server_tok_s']:,.0f}" in captured.out
    assert f"{rows[0]['idle_ttft_ms']} ms to the first token of 252 prompt tokens" in captured.out
    # A line for each request would be one.
    assert " INFO " not in captured.err


LINE = [
    "--models", "tiny", "--tokenizer", str(TOKENIZER), "--api-processes", "2", "--output-tokens", "16-32", *SHORT,
]  # fmt: skip


def test_shapes_need_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--models", "block-1.2B"])
    assert "--tokenizer" in capsys.readouterr().err


def test_a_directory_is_written_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MODELS", {"tiny": MODEL})
    folder = tmp_path / "deep" / "model"
    line = ["model_files", "tiny", str(folder), "--tokenizer", str(TOKENIZER), "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", line)
    model_files.main()
    assert ModelConfig.load(folder) == MODEL.config.model_copy(update={"dtype": "float32"})
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
