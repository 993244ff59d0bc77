"""From settings to children; what cannot start says so in one line."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.process_config import ApiProcessConfig, EngineOptions, EngineProcessConfig, read_process_config
from server.service import control_socket, plan_children
from server.settings import ServeSettings
from server.sockets import bind_port
from tests.engine import tokenizers_of_tests

MODEL = Path(__file__).parents[1] / "golden" / "lookup_prefix2"

SERVE = """
import os, sys
from server.service import serve
from server.settings import load_settings
sys.exit(serve(load_settings(dict(part.split("=", 1) for part in sys.argv[1:]), {})))
"""


def serve(*settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SERVE, *settings], capture_output=True, text=True, timeout=60, check=False
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of the log, in a failure without a traceback."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def test_children_are_told_where_everything_is_and_what_was_set(tmp_path: Path) -> None:
    settings = ServeSettings(
        max_rows=8, device="cpu", random_weights=7, threads=2, log_format="json", port=0, step_timeout=7.5
    )
    with bind_port("127.0.0.1", 0) as listener:
        engine, api = plan_children(settings, MODEL, [listener], tmp_path)
        assert api.pass_fds == (listener.fileno(),)
    told = read_process_config(Path(engine.command[-1]), EngineProcessConfig)
    assert (engine.role, engine.index, told.index) == ("engine", 0, 0)
    assert told.model == str(MODEL)
    assert told.options == EngineOptions(
        device="cpu", max_rows=8, max_waiting=2048, page_size=16, memory_fraction=0.9, prefix_cache=True
    )
    assert (told.random_seed, told.threads, told.log.format, told.step_timeout_s) == (7, 2, "json", 7.5)
    assert engine.stale_files == (Path(told.socket_path),)
    front = read_process_config(Path(api.command[-1]), ApiProcessConfig)
    assert front.engine_sockets == [told.socket_path]
    assert front.control_path == told.control_path == str(control_socket(tmp_path))
    assert front.listen_fd == api.pass_fds[0]
    assert ServeSettings.model_validate_json(front.settings) == settings


def test_a_port_in_use_is_one_line() -> None:
    with bind_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in complaint(serve(f"model={MODEL}", f"port={port}"))


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "there is no directory" in complaint(serve(f"model={tmp_path}/none", "port=0"))


def test_a_broken_config_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    last = complaint(serve(f"model={tmp_path}", "port=0"))
    assert "config.json" in last
    assert "block_length" in last


def test_what_the_engine_finds_wrong_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    with tempfile.TemporaryDirectory() as temporary:  # tmp_path may be too long for sockets
        monkeypatch.setenv("TMPDIR", temporary)
        result = serve(f"model={tmp_path}", "port=0", "device=cpu")
        assert list(Path(temporary).iterdir()) == []
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if " ERROR " in line]
    assert len(errors) == 1
    # Which of the two children is the first to complain of the empty directory is chance.
    assert "cannot start: " in errors[0]
    assert "tokenizer.json" in errors[0] or "safetensors" in errors[0]


def test_ctrl_c_while_it_starts_is_no_failure(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    tokenizers_of_tests.save(tokenizers_of_tests.byte_level(), tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, f"model={tmp_path / 'model'}", "port=0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "engine 0 starts" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()


def test_a_socket_handed_on_is_not_inherited_by_anybody_else() -> None:
    with bind_port("127.0.0.1", 0) as listener:
        assert not listener.get_inheritable()
        assert listener.type == socket.SOCK_STREAM
