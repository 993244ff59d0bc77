"""Configuration files of child processes."""

import json
from pathlib import Path

import pytest

from engine.config import ConfigError, EngineConfig
from engine.process_config import (
    ApiProcessConfig,
    EngineOptions,
    EngineProcessConfig,
    LogConfig,
    read_process_config,
    write_process_config,
)

ENGINE = EngineProcessConfig(
    index=1,
    name="m",
    model="/models/a",
    options=EngineOptions(device="cpu", max_rows=8),
    socket_path="/run/engine1.sock",
    control_path="/run/control.sock",
    log=LogConfig(level="debug", format="json"),
    random_seed=7,
)
API = ApiProcessConfig(
    index=0,
    model="/models/a",
    listen_fd=5,
    engine_sockets=["/run/engine0.sock", "/run/engine1.sock"],
    control_path="/run/control.sock",
    settings='{"port": 8000}',
    log=LogConfig(),
)


def test_a_configuration_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "child.json"
    write_process_config(path, ENGINE)
    assert read_process_config(path, EngineProcessConfig) == ENGINE
    write_process_config(path, API)
    assert read_process_config(path, ApiProcessConfig) == API


def test_options_are_the_settings_of_the_engine() -> None:
    assert set(EngineOptions.__struct_fields__) - {"prefer"} == set(EngineConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no configuration of this process"),
        ("[]", "no configuration of this process"),
        ('{"index": 0}', "missing required field"),
        (json.dumps({"indx": 0}), "indx"),
    ],
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "child.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_process_config(path, EngineProcessConfig)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_process_config(tmp_path / "child.json", ApiProcessConfig)
