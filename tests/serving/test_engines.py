"""Two engine processes, each on the CPU."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ServerProcess, start_server, wait_until
from tests.serving.test_lifecycle import LONG, SHORT, complete, pid_of, streaming

pytestmark = pytest.mark.serving


@pytest.fixture
def two(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with two of them."""
    with start_server(tmp_path, "--devices", "cpu,cpu", device=None) as server:
        wait_until(lambda: server.metric("engine_up", engine="1") == 1, what="the second engine")
        wait_until(lambda: server.metric("engine_up", engine="0") == 1, what="the first engine")
        yield server


def test_requests_are_spread_and_answers_are_the_same(two: ServerProcess) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: complete(two, {**LONG, "max_tokens": 200}), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert all(two.metric("steps_total", engine=engine) > 0 for engine in "01")
    assert two.metric("generation_tokens_total") == 1200


def test_prompts_that_begin_alike_go_to_one_engine_until_it_is_busy(two: ServerProcess) -> None:
    start = "Once upon a time there was a little dog who lived in a big house near the sea. " * 5
    for ending in ("One day", "Every morning", "At night"):
        answer = complete(two, {**SHORT, "prompt": start + ending}).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 0) == (ending != "One day")
    routed = {engine: two.metric("requests_routed_total", engine=engine, by="prefix") for engine in "01"}
    assert sorted(routed.values()) == [0, 3]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: complete(two, {**LONG, "prompt": start, "max_tokens": 200}), range(6)))
    assert all(two.metric("steps_total", engine=engine) > 0 for engine in "01")


def test_one_engines_death_fails_only_its_requests(two: ServerProcess) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(streaming(two, {**LONG, "max_tokens": 1000})) for _ in range(4)]
        # Gauges are a quarter of a second behind.
        wait_until(
            lambda: [two.metric("requests_running", engine=engine) for engine in "01"] == [2, 2],
            what="two on each engine",
        )
        ends: list[list[str]] = [[] for _ in streams]
        readers = [
            threading.Thread(target=lambda lines=lines, end=end: end.extend(lines))
            for lines, end in zip(streams, ends, strict=True)
        ]
        for reader in readers:
            reader.start()
        os.kill(pid_of(two, "engine 1"), signal.SIGKILL)
        wait_until(lambda: two.metric("engine_up", engine="1") == 0, what="its death")
        assert httpx.get(f"{two.url}/ready").status_code == 200
        assert complete(two, SHORT).status_code == 200
        for reader in readers:
            reader.join()
    failed = [end for end in ends if "error" in json.loads(end[-2].removeprefix("data: "))]
    assert len(failed) == 2
    assert all(end[-1] == "data: [DONE]" for end in ends)
    wait_until(lambda: two.metric("engine_up", engine="1") == 1, 60, "its replacement")
    before = two.metric("steps_total", engine="1")
    with ThreadPoolExecutor(4) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: complete(two, SHORT), range(8))} == {200}
    wait_until(lambda: two.metric("steps_total", engine="1") > before, what="its work")
