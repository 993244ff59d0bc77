"""The command line."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.types import InvalidRequestError, SamplingParams
from server import cli
from server.exit_codes import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from server.settings import ServeSettings, flag_name


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What `serve` was called with; it returns exit code 7."""
    calls: list[ServeSettings] = []

    def serve(settings: ServeSettings) -> int:
        calls.append(settings)
        return 7

    monkeypatch.setattr(cli, "serve", serve)
    return calls


def test_serve_passes_its_settings_and_exit_code_on(
    served: list[ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKSERVE_MAX_ROWS", "5")
    arguments = ["serve", "--port", "0", "--served-model-name", "a", "b", "--kv-bytes", "64MiB", "--log-format", "json"]
    assert cli.main(arguments) == 7
    (settings,) = served
    assert (settings.port, settings.served_model_name, settings.kv_bytes) == (0, ("a", "b"), 64 << 20)
    assert (settings.log_format, settings.max_rows) == ("json", 5)


def test_a_bad_setting_is_one_line_on_standard_error(
    served: list[ServeSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--page-size", "9"]) == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("blockserve: --page-size: ")
    assert err.count("\n") == 1
    assert served == []


def test_keys_may_be_given_again_and_again_and_are_shown_nowhere(
    served: list[ServeSettings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["serve", "--api-key", "sk-1", "--api-key", "sk-2", "sk-3"]) == 7
    assert served[0].api_keys() == ("sk-1", "sk-2", "sk-3")
    monkeypatch.setenv("BLOCKSERVE_API_KEY", "sk-secret")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert cli.main(["serve", "--api-key", "sk secret"]) == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert "secret" not in out + err


def test_help_lists_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in ServeSettings.model_fields:
        assert re.search(rf"^  {flag_name(name)}[ ,]", text, re.MULTILINE), name
    lists = sum(isinstance(field.default, tuple) for field in ServeSettings.model_fields.values())
    assert text.count("[") == text.count("]") == len(ServeSettings.model_fields) + lists + 1
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["serve", "--unheard-of", "1"], ["serve", "stray"]])
def test_what_is_not_understood(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == EXIT_BAD_INPUT


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert re.fullmatch(r"blockserve \S+( \([0-9a-f]{12}\))?\n", capsys.readouterr().out)


@dataclass
class FakeLLM:
    """Says three pieces, or raises."""

    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    asked: list[tuple[str, SamplingParams]] = field(default_factory=list)
    error: BaseException | None = None
    pieces: tuple[str, ...] = (" there", " was", " a fox")

    def __call__(self, *args: Any, **options: Any) -> "FakeLLM":
        self.made.append((args, options))
        return self

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        self.asked.append((prompt, params))
        if self.error is not None:
            raise self.error
        yield from self.pieces


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr(engine, "LLM", fake, raising=False)
    return fake


def test_generate_prints_the_prompt_and_the_text(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKSERVE_DTYPE", "float32")
    arguments = [
        "--seed",
        "4",
        "--temperature",
        "0.5",
        "--stop",
        "x",
        "--stop",
        "y",
        "--model",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert cli.main(["generate", "Once", *arguments]) == 0
    assert capsys.readouterr().out == "Once there was a fox\n"
    ((prompt, params),) = llm.asked
    assert prompt == "Once"
    assert params == SamplingParams(max_tokens=200, seed=4, temperature=0.5, stop=("x", "y"))
    assert llm.made == [((str(tmp_path),), {"random_seed": None, "device": "cpu", "dtype": "float32"})]


def test_generate_with_no_text_to_add(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.pieces = ()
    assert cli.main(["generate"]) == 0
    assert capsys.readouterr().out == "Once upon a time\n"


def test_generate_prints_nothing_of_a_request_that_is_refused(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.error = InvalidRequestError("temperature", "prompt 0: temperature is wrong")
    assert cli.main(["generate"]) == EXIT_BAD_INPUT
    assert capsys.readouterr() == ("", "blockserve: temperature is wrong\n")


def test_generate_interrupted(llm: FakeLLM) -> None:
    llm.error = KeyboardInterrupt()
    assert cli.main(["generate"]) == EXIT_INTERRUPTED


def test_eval_prints_a_line_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("Once upon a time\n<|endoftext|>\nThe end.\n<|endoftext|>\nleft out\n", encoding="utf-8")
    assert cli.main(["eval", str(path), "--limit", "2", "--device", "cpu", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    header, *lines = [line.split("\t") for line in out.splitlines()]
    assert header == ["file", "document", "tokens", "bytes", "loss", "bits_per_byte"]
    assert [line[:2] for line in lines] == [["texts.txt", "0"], ["texts.txt", "1"], ["texts.txt", "all"]]
    assert sum(int(line[2]) for line in lines[:2]) == int(lines[2][2]) > 0
    assert cli.main(["eval", str(tmp_path / "missing"), "--device", "cpu"]) == EXIT_BAD_INPUT
