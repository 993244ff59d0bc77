from pathlib import Path

import pytest

from engine import model_files
from engine.config import ConfigError
from engine.model_files import DEFAULT_MODEL, embedded_model_directory, find_model, model_name, read_ahead


def test_the_default_is_embedded() -> None:
    assert find_model(None) == find_model(DEFAULT_MODEL) == embedded_model_directory()
    assert model_name(None) == DEFAULT_MODEL


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    directory.mkdir()
    assert find_model(str(directory)) == directory.resolve()
    assert model_name(str(directory)) == "tiny"


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_named(model: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no directory {model}"):
        find_model(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file; name the directory"):
        find_model(str(weights))


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="nobody/nothing, and it could not be fetched"):
        find_model("nobody/nothing")


def test_weights_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "READ_AHEAD_BYTES", 1000)
    for name, size in (("a.safetensors", 12_345), ("b.safetensors", 700), ("c.json", 50_000)):
        (tmp_path / name).write_bytes(bytes(size))
    before = _bytes_read()
    for thread in read_ahead(tmp_path):
        thread.join()
    assert 13_045 <= _bytes_read() - before < 50_000


def test_a_link_to_nothing_is_not_read_ahead(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    for thread in read_ahead(tmp_path):
        thread.join()


def _bytes_read() -> int:
    """By this process, from files, as Linux counts it."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])
