"""The generated parts of the documentation say what the code says."""

from pathlib import Path

import pytest

from docs.generate import DOCS, PART, PARTS, renew
from engine.metrics import METRICS
from server.settings import ServeSettings, flag_name

OPERATIONS = DOCS / "operations.md"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_a_page_is_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert renew(text) == text, "run `make docs`"


def test_operations_has_every_part() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    assert {match["name"] for match in PART.finditer(text)} == set(PARTS)


def test_operations_names_every_flag_and_metric() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    flags = [flag_name(name) for name in ServeSettings.model_fields]
    missing = [flag for flag in flags if f"`{flag} " not in text and f"`{flag}`" not in text]
    missing += [metric.name for metric in METRICS.values() if f"`{metric.name}`" not in text]
    assert not missing


def test_renew_replaces_only_what_is_marked() -> None:
    page = "before\n<!-- generated: metrics -->\nstale lines\n<!-- end -->\nafter\n"
    renewed = renew(page)
    assert renewed.startswith("before\n<!-- generated: metrics -->\n")
    assert renewed.endswith("<!-- end -->\nafter\n")
    assert "stale lines" not in renewed
    assert renew(renewed) == renewed


def test_an_unknown_part_is_an_error() -> None:
    with pytest.raises(KeyError):
        renew("<!-- generated: nothing -->\n<!-- end -->\n")
