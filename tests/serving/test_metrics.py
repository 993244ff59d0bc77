"""What a fixed mix of requests adds to every counter and histogram, exactly; and the names as documented."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.metrics import METRICS
from tests.serving.server_process import ServerProcess, start_server, wait_until

LONG = 1600
PROMPT = "Once upon a time"  # four tokens

EXPECTED = {
    "requests_total{outcome=length}": 4,
    "requests_total{outcome=abort}": 1,
    "requests_total{outcome=rejected}": 1,
    "prompt_tokens_total": 3 * 4,
    "prefix_cache_queries_total{engine=0}": 4 * 4,
    # The one that leaves the queue was taken too.
    "requests_routed_total{by=load,engine=0}": 5,
    "generation_tokens_total": LONG + 10 + 2 * 8,
    "steps_total{engine=0}": LONG // 4 + 3 + 2 * 2,
    "http_requests_total{handler=/v1/completions,method=POST,status=200}": 3,
    "http_requests_total{handler=/v1/completions,method=POST,status=400}": 1,
    "http_requests_total{handler=/v1/completions,method=POST,status=429}": 1,
    "http_requests_total{handler=/v1/completions,method=POST,status=499}": 1,
    "step_seconds_count{engine=0}": LONG // 4 + 3 + 2 * 2,
    "batch_rows_count{engine=0}": LONG // 4 + 3 + 2 * 2,
    "batch_rows_sum{engine=0}": LONG // 4 + 3 + 2 * 2,
    "time_to_first_token_seconds_count": 4,
    "inter_token_latency_seconds_count": (LONG // 4 - 1) + 2 + 2 * 1,
    "time_per_output_token_seconds_count": 4,
    "request_latency_seconds_count": 4,
    "request_queue_seconds_count": 4,
    "request_prefill_seconds_count": 4,
    "request_decode_seconds_count": 4,
    "request_prompt_tokens_count": 4,
    "request_prompt_tokens_sum": 4 * 4,
    "request_generation_tokens_count": 4,
    "request_generation_tokens_sum": LONG + 10 + 2 * 8,
}
"""Increments by series, of samples whose value a mix determines; any other such sample may not change."""


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with one row, and room for one request to wait."""
    with start_server(tmp_path, "--max-rows", "1", "--max-waiting", "1", "--max-choices", "1024") as server:
        yield server


def counted(server: ServerProcess) -> dict[str, float]:
    """Samples of counters and histograms that do not depend on time or on being scraped, by readable name."""
    found = {}
    for (name, labels), value in server.metrics().items():
        short = name.removeprefix("blockserve_")
        times = short.endswith(("_bucket", "_created")) or ("_seconds" in short and short.endswith("_sum"))
        times = times or short.startswith("event_loop_lag_")
        if times or not short.endswith(("_total", "_count", "_sum")) or _is_probe(labels):
            continue
        shown = ",".join(f"{label}={text}" for label, text in labels)
        found[short + (f"{{{shown}}}" if shown else "")] = value
    return found


def _is_probe(labels: tuple[tuple[str, str], ...]) -> bool:
    return any(label == "handler" and text in ("/metrics", "/ready") for label, text in labels)


def test_a_fixed_mix_counts_exactly(small_server: ServerProcess) -> None:
    before = counted(small_server)
    body = {"prompt": PROMPT, "ignore_eos": True, "seed": 1}
    with httpx.Client(base_url=small_server.url, timeout=120) as client:
        with client.stream("POST", "/v1/completions", json={**body, "max_tokens": LONG, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            # The one row is taken now. One request waits, a second is refused, and the first leaves before its turn.
            with ThreadPoolExecutor(1) as pool:
                impatient = pool.submit(post_and_leave, small_server, {**body, "max_tokens": 5}, seconds=0.8)
                wait_until(lambda: small_server.metric("requests_waiting", engine="0") == 1, what="a waiting request")
                refused = client.post("/v1/completions", json=body)
                impatient.result()
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            for _ in lines:
                pass
        with client.stream("POST", "/v1/completions", json={**body, "max_tokens": 10, "stream": True}) as streamed:
            streamed.read()
        assert client.post("/v1/completions", json={**body, "max_tokens": 8, "n": 2}).status_code == 200
        assert client.post("/v1/completions", json={**body, "max_tokens": -1}).status_code == 400

    def increments() -> dict[str, float]:
        after = counted(small_server)
        return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}

    # Processes send what they counted every quarter of a second: give the last increments time, and wrong ones too.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: increments() == EXPECTED, timeout=5)
    time.sleep(0.5)
    assert increments() == EXPECTED
    for gauge in ("requests_running", "requests_waiting", "kv_pages_used", "kv_cache_usage_ratio"):
        assert small_server.metric(gauge, engine="0") == 0


def post_and_leave(server: ServerProcess, body: dict[str, object], seconds: float) -> None:
    """Post a completion and hang up before it can be answered."""
    with httpx.Client(base_url=server.url, timeout=seconds) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body)


def test_documented_and_scraped_names_are_equal_sets(server: ServerProcess) -> None:
    httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}).raise_for_status()
    text = httpx.get(f"{server.url}/metrics").text
    scraped = {family.name for family in text_string_to_metric_families(text)}
    declared = {metric.name.removesuffix("_total") for metric in METRICS.values()}
    operations = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    documented = {name.removesuffix("_total") for name in re.findall(r"`(blockserve_[a-z_]+)`", operations)}
    assert scraped == declared == documented


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_finds_nothing_to_complain_about(server: ServerProcess) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_what_the_prefix_cache_held_is_told_in_usage_and_counted(server: ServerProcess) -> None:
    prompt = [300 + place for place in range(132)]
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "cache_salt": "of this test"}
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
    before = [server.metric(name, engine="0") for name in names]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        first, second = (client.post("/v1/completions", json=body).json() for _ in range(2))
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)] == [0, 128]
    assert first["choices"] == second["choices"]
    wait_until(lambda: server.metric(names[0], engine="0") == before[0] + 2 * 132, timeout=5)
    assert server.metric(names[1], engine="0") == before[1] + 128
