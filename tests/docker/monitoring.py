"""The files of docker/ as tests read them."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.repository import ROOT

DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "blockserve.json"
ALERTS = DOCKER / "prometheus" / "alerts.yml"


def alerts() -> list[dict[str, Any]]:
    """Every alert rule."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> Any:
    """The dashboard."""
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and query, of every query."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def metrics_in(query: str) -> set[str]:
    """The names of our metrics in a query."""
    return set(re.findall(r"\bblockserve_\w+", query))
