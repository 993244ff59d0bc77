"""The engine's side of the control connection, against a plain socket in the supervisor's place."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.control import EXIT_ORPHANED, ControlChannel
from engine.messages import (
    ChildHello,
    ChildReady,
    MetricsIncrement,
    ServiceState,
    Shutdown,
    ToSupervisor,
    encode_frame,
    to_supervisor_reader,
)


class Supervisor:
    """A listening socket and the first connection to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(10)
        self.peer = self.listener

    def accept(self) -> socket.socket:
        self.peer = self.listener.accept()[0]
        self.peer.settimeout(10)
        return self.peer

    def read(self, count: int) -> list[ToSupervisor]:
        frames, messages = to_supervisor_reader(), list[ToSupervisor]()
        while len(messages) < count:
            data = self.peer.recv(1 << 16)
            assert data, f"end of file after {messages}"
            messages += frames.feed(data)
        return messages

    def close(self) -> None:
        self.peer.close()
        self.listener.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "control.sock")
    yield made
    made.close()


def test_a_child_says_who_it_is_and_what_it_sends_arrives_in_order(supervisor: Supervisor) -> None:
    channel = ControlChannel.connect(supervisor.path, "engine", 3)
    supervisor.accept()
    sent = [MetricsIncrement(counters=[("steps_total", ("3",), float(i))]) for i in range(200)]
    for message in sent:
        channel.send(message)
    assert supervisor.read(201) == [ChildHello(role="engine", index=3, pid=os.getpid()), *sent]
    channel.close()


def test_messages_wait_for_poll_and_are_announced(supervisor: Supervisor) -> None:
    announced = threading.Semaphore(0)
    channel = ControlChannel.connect(supervisor.path, "engine", 0, on_message=announced.release)
    peer = supervisor.accept()
    assert channel.poll() == []
    state = ServiceState(healthy=True, engines_up=1, draining=False)
    peer.sendall(encode_frame(state) + encode_frame(Shutdown(deadline_s=2.0)))
    assert announced.acquire(timeout=10)
    assert announced.acquire(timeout=10)
    assert channel.poll() == [state, Shutdown(deadline_s=2.0)]
    assert channel.poll() == []
    channel.close()


def test_close_sends_what_is_queued_and_is_not_an_end(supervisor: Supervisor) -> None:
    ended = threading.Event()
    channel = ControlChannel.connect(supervisor.path, "engine", 0, on_end=ended.set)
    supervisor.accept()
    channel.send(ChildReady())
    channel.close()
    assert supervisor.read(2)[1] == ChildReady()
    assert supervisor.peer.recv(1) == b""
    assert not ended.is_set()


def test_a_supervisor_that_does_not_read_holds_up_nobody(supervisor: Supervisor) -> None:
    channel = ControlChannel.connect(supervisor.path, "engine", 0, on_end=lambda: None)
    supervisor.accept()
    large = MetricsIncrement(counters=[("steps_total", ("0",), 1.0)] * 10_000)
    started = time.monotonic()
    for _ in range(200):
        channel.send(large)
    assert time.monotonic() - started < 1
    channel.close(timeout_s=0.05)


def test_end_of_file_and_garbage_end_the_child(supervisor: Supervisor) -> None:
    for last_words in (b"", b"\xff\xff\xff\xff"):
        ended = threading.Event()
        channel = ControlChannel.connect(supervisor.path, "engine", 0, on_end=ended.set)
        peer = supervisor.accept()
        peer.sendall(last_words)
        if not last_words:
            peer.close()
        assert ended.wait(10)
        channel.close()


def test_nobody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ControlChannel.connect(tmp_path / "control.sock", "engine", 0)


BUSY_CHILD = """
import sys
from pathlib import Path
from engine.control import ControlChannel, become_child
become_child()
channel = ControlChannel.connect(Path(sys.argv[1]), "engine", 0)
while True:
    pass  # a step that never asks for messages
"""


def test_a_child_in_the_middle_of_a_step_exits_within_two_seconds_of_its_supervisor(supervisor: Supervisor) -> None:
    child = subprocess.Popen([sys.executable, "-c", BUSY_CHILD, str(supervisor.path)])
    try:
        supervisor.accept()
        supervisor.read(1)
        child.send_signal(signal.SIGTERM)  # not the child's to answer
        child.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        supervisor.close()
        assert child.wait(2) == EXIT_ORPHANED
    finally:
        child.kill()
        child.wait()


STUCK_CHILD = """
import ctypes, os, signal, subprocess, sys
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, "-c", os.environ["STUCK_CHILD"], "child"], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
from engine.control import become_child
become_child()
print("ready", flush=True)
ctypes.PyDLL(None).sleep(60)  # holds the interpreter lock: no thread of this process runs
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a service of the Linux kernel")
def test_a_child_whose_threads_are_stuck_dies_with_its_supervisor() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", STUCK_CHILD],
        env={**os.environ, "STUCK_CHILD": STUCK_CHILD},
        stdout=subprocess.PIPE,
        timeout=20,
        check=False,
    )
    pid = int(answer.stdout)
    deadline = time.monotonic() + 2
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_leaving_says_all_that_was_logged_and_waits_for_no_thread() -> None:
    script = (
        "import logging, sys, threading, time\n"
        "from engine.control import leave\n"
        "logging.basicConfig()\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "sys.stdout.write('out')\n"
        "logging.warning('the last words')\n"
        "leave(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (7, "out")
    assert "the last words" in done.stderr
