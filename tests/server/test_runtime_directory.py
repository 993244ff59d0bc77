"""The supervisor's private directory."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from server.runtime_directory import PREFIX, RuntimeDirectoryError, remove_abandoned, runtime_directory


def test_nobody_else_may_enter_and_it_is_removed_at_the_end(tmp_path: Path) -> None:
    with runtime_directory(tmp_path) as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "engine0.sock").touch()
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    with runtime_directory(tmp_path) as first, runtime_directory(tmp_path) as second:
        assert first != second
        assert first.is_dir()
        remove_abandoned(tmp_path)
        assert first.is_dir()
        assert second.is_dir()


KILLED = """
import os, signal, sys
from pathlib import Path
from server.runtime_directory import runtime_directory
with runtime_directory(Path(sys.argv[1])) as directory:
    (directory / "control.sock").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_supervisor_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (abandoned,) = tmp_path.iterdir()
    with runtime_directory(tmp_path) as directory:
        assert not abandoned.exists()
        assert directory.exists()


def test_what_is_not_a_runtime_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target" / "lock").mkdir(parents=True)
    (tmp_path / f"{PREFIX}without-lock").mkdir()
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "target")
    before = sorted(tmp_path.iterdir())
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_path_too_long_for_sockets_is_refused_and_removed(tmp_path: Path) -> None:
    parent = tmp_path / ("x" * 100)
    parent.mkdir()
    with pytest.raises(RuntimeDirectoryError, match="TMPDIR"), runtime_directory(parent):
        pass
    assert list(parent.iterdir()) == []


def test_a_parent_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeDirectoryError, match="TMPDIR"), runtime_directory(tmp_path / "none"):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"{PREFIX}other"
    other.mkdir()
    (other / "lock").touch()
    os.chown(other, 65534, 65534)
    remove_abandoned(tmp_path)
    assert (other / "lock").exists()
