"""Debian's Prometheus scrapes a real server: every metric of the dashboard and of the rules is there, and answers."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.docker.monitoring import ALERTS, DOCKER, alerts, dashboard_queries, metrics_in
from tests.serving.server_process import ServerProcess, free_port, start_server, wait_until

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
SOON = "8s"
"""In place of the dashboard's interval, for a test of seconds: a rate needs two scrapes."""


@contextlib.contextmanager
def prometheus(tmp_path: Path, target: str) -> Iterator[str]:
    """Prometheus with the project's configuration, which scrapes `target` every second; its URL."""
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(ALERTS, tmp_path)
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(f"{url}/-/ready"), 30, "Prometheus")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, query: str) -> list[Any]:
    """What Prometheus answers to a query."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10).json()
    assert answer["status"] == "success", answer
    result: list[Any] = answer["data"]["result"]
    return result


def health(url: str) -> list[str]:
    """Whether each rule could be evaluated."""
    groups = httpx.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
    return [rule["health"] for group in groups for rule in group["rules"]]


def load(server: ServerProcess, stop: threading.Event) -> None:
    """Completions, one after the other, and a wrong one between, until told to stop."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while not stop.wait(0.05):
            client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 16, "ignore_eos": True})
            client.post("/v1/completions", json={"prompt": "Once", "max_tokens": -1})


def test_dashboard_and_rules_find_their_metrics(tmp_path: Path) -> None:
    with start_server(tmp_path, "--max-rows", "4") as server, prometheus(tmp_path, server.url[7:]) as url:
        stop = threading.Event()
        loading = threading.Thread(target=load, args=(server, stop))
        loading.start()
        try:
            queries = [query.replace("$__rate_interval", SOON) for _, query in dashboard_queries()]
            queries = [query.replace("$instance", ".*") for query in queries]
            deadline = time.monotonic() + 40
            while missing := [query for query in queries if not ask(url, query)]:
                assert time.monotonic() < deadline, f"no data: {missing}"
                time.sleep(1)
            named = set().union(*(metrics_in(rule["expr"]) for rule in alerts()))
            assert {name for name in named if not ask(url, name)} == set()
            wait_until(lambda: health(url) == ["ok"] * len(alerts()), 20, "the evaluation of the rules")
            assert httpx.get(f"{url}/api/v1/alerts").json()["data"]["alerts"] == []
        finally:
            stop.set()
            loading.join()
