"""Prometheus's and Grafana's files name what the server has."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from engine.metrics import METRICS, PREFIX
from tests.docker.monitoring import ALERTS, DOCKER, alerts, dashboard, dashboard_queries, metrics_in

QUERIES = [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in alerts())]
OF_PROMETHEUS = {"instance", "job", "le"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def samples() -> dict[str, set[str]]:
    """The labels of every sample that a scrape has, by its name."""
    found = {}
    for metric in METRICS.values():
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        found.update({metric.name + ending: set(metric.labels) for ending in endings})
    return found


@pytest.mark.parametrize(
    ("name", "query"), QUERIES, ids=[f"{number} {name}" for number, (name, _) in enumerate(QUERIES)]
)
def test_a_query_names_metrics_and_labels_that_exist(name: str, query: str) -> None:
    known = samples()
    assert metrics_in(query) <= set(known)
    assert metrics_in(query) or query == 'up{job="blockserve"} == 0'
    matched = set(re.findall(r"(\w+)\s*=~?\s*\"", query))
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}
    allowed = OF_PROMETHEUS.union(*(known[metric] for metric in metrics_in(query)))
    assert matched | grouped <= allowed


def test_names_in_texts_exist() -> None:
    texts = " ".join(text for rule in alerts() for text in rule["annotations"].values())
    assert metrics_in(texts) <= {metric.name for metric in METRICS.values()}
    assert len(PREFIX) < len(texts)


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) >= 8
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        assert all(len(text) > 30 and text.endswith(".") for text in rule["annotations"].values())


def test_the_dashboard_shows_what_operators_look_for() -> None:
    shown = set().union(*(metrics_in(query) for _, query in dashboard_queries()))
    wanted = {
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "requests_waiting",
        "requests_running",
        "kv_cache_usage_ratio",
        "batch_rows_sum",
        "step_seconds_bucket",
        "http_requests_total",
        "engine_restarts_total",
    }
    assert {PREFIX + name for name in wanted} <= shown
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_the_dashboard_asks_the_provisioned_datasource() -> None:
    provisioned = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioned / "datasources" / "prometheus.yaml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for panel in dashboard()["panels"]}
    used |= {target["datasource"]["uid"] for panel in dashboard()["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}


@needs_promtool
def test_prometheus_takes_its_configuration_and_the_rules() -> None:
    for command in (["config", str(DOCKER / "prometheus" / "prometheus.yml")], ["rules", str(ALERTS)]):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARN" not in done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "alerts_test.yml").read_text(encoding="utf-8")
    (tmp_path / "alerts_test.yml").write_text(text.replace("alerts.yml", str(ALERTS)), encoding="utf-8")
    command = ["promtool", "test", "rules", str(tmp_path / "alerts_test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load((Path(__file__).parent / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts()}
