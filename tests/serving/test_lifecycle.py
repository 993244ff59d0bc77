"""Drain, and what dies when a process is killed: the real processes, with an answer under way."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.server_process import ServerProcess, start_server, wait_until

LONG = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that a test may break."""
    with start_server(tmp_path, "--drain-timeout", "60", "--step-timeout", "3") as server:
        yield server


def pid_of(server: ServerProcess, process: str) -> int:
    """The newest process id of a child, from the log."""
    return int(re.findall(rf"{process} starts pid=(\d+)", server.log.read_text())[-1])


@contextmanager
def streaming(server: ServerProcess, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The data lines of a stream whose first has come."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        yield lines


def complete(server: ServerProcess, body: dict[str, Any]) -> httpx.Response:
    """An unstreamed completion."""
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_a_killed_engine_fails_its_requests_clearly_and_is_replaced(own_server: ServerProcess) -> None:
    expected = complete(own_server, SHORT).json()["choices"][0]["text"]
    served = own_server.metric("generation_tokens_total")
    answers: list[httpx.Response] = []
    unstreamed = threading.Thread(target=lambda: answers.append(complete(own_server, LONG)))
    unstreamed.start()
    with streaming(own_server, LONG) as lines:
        wait_until(lambda: own_server.metric("requests_running", engine="0") == 2, what="two running requests")
        os.kill(pid_of(own_server, "engine 0"), signal.SIGKILL)
        *_, error, done = list(lines)
    unstreamed.join()
    assert done == "data: [DONE]"
    assert "engine" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert answers[0].status_code == 503
    assert int(answers[0].headers["retry-after"]) >= 1
    assert httpx.get(f"{own_server.url}/health").status_code == 200
    wait_until(lambda: httpx.get(f"{own_server.url}/ready").status_code == 200, what="readiness")
    assert complete(own_server, SHORT).json()["choices"][0]["text"] == expected
    assert own_server.metric("engine_restarts_total", engine="0") == 1
    assert own_server.metric("requests_total", outcome="error") == 2
    assert own_server.metric("generation_tokens_total") > served
    assert own_server.metric("requests_running", engine="0") == 0


def test_a_killed_api_process_frees_its_rows_and_is_replaced(own_server: ServerProcess) -> None:
    with streaming(own_server, LONG) as lines:
        os.kill(pid_of(own_server, "api 0"), signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(lines)

    def served_again() -> bool:
        try:
            return own_server.metric("requests_running", engine="0") == 0 and complete(own_server, SHORT).is_success
        except httpx.TransportError:
            return False

    wait_until(served_again, what="an answer from the new API process")
    assert own_server.metric("kv_pages_used", engine="0") == 0
    assert own_server.metric("engine_restarts_total", engine="0") == 0


def test_a_killed_supervisor_takes_everything_with_it(own_server: ServerProcess) -> None:
    children = [pid_of(own_server, "engine 0"), pid_of(own_server, "api 0")]
    port = int(own_server.url.rsplit(":", 1)[1])
    with streaming(own_server, LONG):
        own_server.process.kill()
        own_server.process.wait()
        wait_until(lambda: not any(map(_alive, children)), timeout=2, what="the end of the children")
    # A process is a zombie as soon as its first thread has ended; the last one closes its descriptors.
    wait_until(lambda: _free(port), timeout=2, what="the freeing of the port")


def test_sigterm_finishes_what_is_open_and_refuses_what_is_new(own_server: ServerProcess) -> None:
    with streaming(own_server, LONG) as lines:
        own_server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{own_server.url}/ready").status_code == 503, what="a drain")
        assert httpx.get(f"{own_server.url}/health").status_code == 200
        refused = complete(own_server, SHORT)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        *_, last, done = list(lines)
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert own_server.process.wait(30) == 0
    assert "Traceback" not in own_server.log.read_text()


def descriptors(server: ServerProcess) -> dict[str, int]:
    """Open descriptors of each process."""
    pids = {"supervisor": server.process.pid} | {name: pid_of(server, name) for name in ("engine 0", "api 0")}
    return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}


def burst(server: ServerProcess) -> None:
    """Answers, streams that are hung up on midway, bad requests, garbage, and connections that say nothing."""
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(server, SHORT).status_code, range(16)))
        refused = list(pool.map(lambda _: complete(server, {**SHORT, "max_tokens": -1}).status_code, range(16)))
    assert (set(answers), set(refused)) == ({200}, {400})
    for _ in range(4):
        with streaming(server, LONG):
            pass
    for data in (b"\x00\xff" * 50, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Le", b""):
        for _ in range(8):
            with socket.create_connection(address, timeout=5) as stream:
                stream.sendall(data)


def test_no_descriptor_is_left_open(own_server: ServerProcess) -> None:
    burst(own_server)
    wait_until(lambda: own_server.metric("requests_running", engine="0") == 0, what="an idle engine")
    time.sleep(1)
    before = descriptors(own_server)
    burst(own_server)

    def as_before() -> bool:
        return all(count <= before[name] for name, count in descriptors(own_server).items())

    wait_until(as_before, what=f"no more descriptors than before, {before}")


def test_a_hung_step_turns_health_red_and_ends_the_service(own_server: ServerProcess) -> None:
    started = time.monotonic()
    with streaming(own_server, LONG):
        os.kill(pid_of(own_server, "engine 0"), signal.SIGSTOP)
        wait_until(lambda: httpx.get(f"{own_server.url}/health").status_code == 503, what="red health")
        assert time.monotonic() - started > 2
    assert own_server.process.wait(30) == 1
    assert "engine 0" in own_server.log.read_text()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
