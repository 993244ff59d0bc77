"""What is made of a server's own counter."""

import time

import httpx
import pytest
from prometheus_client.samples import Sample

from benchmarks import server
from benchmarks.server import Count, Served, counted
from tests.benchmarks.tiny import MODEL


class Busy(Served):
    """Makes 1000 tokens a second, of two API processes' counts, and answers every other scrape."""

    scrapes = 0

    def samples(self) -> list[Sample]:
        Busy.scrapes += 1
        if Busy.scrapes % 2:
            raise httpx.ReadTimeout("busy")
        tokens = 500.0 * time.time()
        name = "blockserve_generation_tokens_total"
        return [Sample(name, {}, tokens), Sample(name, {}, tokens), Sample("blockserve_requests_total", {}, tokens**2)]


def test_a_rate_is_that_between_the_looks_inside() -> None:
    count = Count([(9.7, 900.0), (10.2, 1000.0), (10.7, 1100.0), (11.2, 1250.0), (11.7, 9000.0)])
    assert count.tokens_per_second(10.0, 1.5) == pytest.approx(250.0)


def test_one_look_is_no_rate() -> None:
    with pytest.raises(ValueError, match="too short"):
        Count([(9.7, 900.0), (10.2, 1000.0)]).tokens_per_second(10.0, 0.4)


def test_the_counter_is_read_while_something_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOOK_S", 0.01)
    began = time.time()
    with counted(Busy("http://x", 1, MODEL.config, 0.0, 0.0)) as count:
        deadline = time.monotonic() + 10
        while len(count.looks) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    looks = len(count.looks)
    assert looks >= 5
    assert count.tokens_per_second(began, time.time() - began) == pytest.approx(1000, rel=0.1)
    time.sleep(0.05)
    assert len(count.looks) == looks
