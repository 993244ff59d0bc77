"""Starting children, and when they may be started again."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from server.children import (
    ChildProcess,
    ChildSpec,
    RestartPolicy,
    Restarts,
    child_environment,
    describe_exit,
    module_command,
)


def spec(code: str, *arguments: str, pass_fds: tuple[int, ...] = (), stale: tuple[Path, ...] = ()) -> ChildSpec:
    return ChildSpec("engine", 0, (sys.executable, "-c", code, *arguments), pass_fds, stale)


def test_delays_double_up_to_a_limit_and_then_the_service_gives_up() -> None:
    restarts = Restarts(RestartPolicy(first_delay_s=0.5, longest_delay_s=3.0, attempts=5))
    assert [restarts.next_delay(0.0) for _ in range(6)] == [0.5, 1.0, 2.0, 3.0, 3.0, None]


def test_the_defaults_are_half_a_second_doubling_five_times() -> None:
    restarts = Restarts(RestartPolicy())
    assert [restarts.next_delay(59.0) for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, None]


def test_a_minute_of_work_starts_a_new_row() -> None:
    restarts = Restarts(RestartPolicy(attempts=2))
    assert [restarts.next_delay(seconds) for seconds in (0, 0, 60, 0, 59)] == [0.5, 1.0, 0.5, 1.0, None]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-63, "was killed by signal 63"),
    ],
)
def test_an_exit_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


async def test_a_child_has_a_session_of_its_own_and_no_input() -> None:
    code = "import os, sys; sys.exit(os.getsid(0) == os.getpid() and sys.stdin.read() == '')"
    assert await ChildProcess(spec(code)).wait() == 1


async def test_a_child_gets_the_descriptors_it_is_given_and_no_others() -> None:
    read, write = os.pipe()
    other_read, other_write = os.pipe()
    code = """
import os, sys
os.write(int(sys.argv[1]), b"hello")
try:
    os.fstat(int(sys.argv[2]))
except OSError:
    sys.exit(0)
sys.exit(1)
"""
    try:
        child = ChildProcess(spec(code, str(write), str(other_write), pass_fds=(write,)))
        assert await child.wait() == 0
        assert os.read(read, 10) == b"hello"
    finally:
        for descriptor in (read, write, other_read, other_write):
            os.close(descriptor)


async def test_what_a_predecessor_left_is_removed_before_the_start(tmp_path: Path) -> None:
    stale = tmp_path / "engine0.sock"
    stale.touch()
    code = "import os, sys; sys.exit(os.path.exists(sys.argv[1]))"
    assert await ChildProcess(spec(code, str(stale), stale=(stale, tmp_path / "never there"))).wait() == 0


async def test_a_killed_child_is_reported_with_its_signal() -> None:
    child = ChildProcess(spec("import time; time.sleep(60)"))
    assert not child.exited
    assert child.seconds_ready == 0
    child.kill()
    assert await asyncio.wait_for(child.wait(), 5) == -signal.SIGKILL
    assert child.exited
    child.kill()  # of no effect, and no error


async def test_our_modules_run_whatever_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("server", "engine"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    command = module_command("server.banner", tmp_path / "config.json")
    assert await ChildProcess(ChildSpec("api", 0, command)).wait() == 0


def test_a_path_for_python_in_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert child_environment()["PYTHONPATH"].split(os.pathsep)[-1] == "/somewhere"
