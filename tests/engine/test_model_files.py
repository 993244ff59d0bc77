from pathlib import Path

import pytest

from engine.config import ConfigError
from engine.model_files import DEFAULT_MODEL, embedded_model_directory, find_model, model_name


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
