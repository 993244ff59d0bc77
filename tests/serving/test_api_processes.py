"""Two API processes behind one port."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ServerProcess, start_server, wait_until
from tests.serving.test_lifecycle import LONG, SHORT, complete, pid_of, streaming

pytestmark = pytest.mark.serving


@pytest.fixture
def two(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with two of them."""
    with start_server(tmp_path, "--api-processes", "2", "--drain-timeout", "60") as server:
        yield server


def served_by(server: ServerProcess) -> set[str]:
    """The processes that have logged a completion."""
    lines = server.log.read_text().splitlines()
    return {line.split("api ")[1][0] for line in lines if "path=/v1/completions" in line}


def complete_until_both_served(server: ServerProcess) -> int:
    """Completions, each on a connection of its own, which the kernel spreads; how many it took."""
    asked = 0
    while served_by(server) != {"0", "1"}:
        assert asked < 100, "one process gets every connection"
        assert complete(server, SHORT).status_code == 200
        asked += 1
    return asked


def test_both_serve_and_either_has_all_metrics(two: ServerProcess) -> None:
    asked = complete_until_both_served(two)
    # Increments travel four times a second.
    wait_until(lambda: two.metric("requests_total", outcome="length") == asked, what="every increment")
    time.sleep(0.5)
    counts = {two.metric("generation_tokens_total") for _ in range(10)}
    assert counts == {8.0 * asked}
    assert httpx.get(f"{two.url}/load").status_code == 200


def test_a_killed_one_takes_only_its_own_requests_along(two: ServerProcess) -> None:
    complete_until_both_served(two)
    with ThreadPoolExecutor(8) as pool:
        body = {**LONG, "max_tokens": 400}
        answers = [pool.submit(complete, two, body) for _ in range(8)]
        wait_until(lambda: two.metric("requests_running", engine="0") == 8, what="eight running requests")
        os.kill(pid_of(two, "api 0"), signal.SIGKILL)
        errors = [answer.exception() for answer in answers]
    assert {type(error) for error in errors} <= {type(None), httpx.ReadError, httpx.RemoteProtocolError}
    assert all(answer.result().status_code == 200 for answer, error in zip(answers, errors, strict=True) if not error)
    wait_until(lambda: two.metric("requests_running", engine="0") == 0, what="rows given back")
    wait_until(lambda: two.log.read_text().count("api 0 is ready") == 2, what="its replacement")
    assert all(complete(two, SHORT).status_code == 200 for _ in range(10))


def test_both_drain(two: ServerProcess) -> None:
    with streaming(two, {**LONG, "max_tokens": 200}) as one, streaming(two, {**LONG, "max_tokens": 200}) as other:
        two.process.send_signal(signal.SIGTERM)
        assert [list(lines)[-1] for lines in (one, other)] == ["data: [DONE]"] * 2
    assert two.process.wait(30) == 0
