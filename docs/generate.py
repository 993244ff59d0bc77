"""Writes the parts of the documentation that the code already says: `python -m docs.generate`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything else in a page is left alone.
tests/docs/test_generate.py fails while a page is behind the code.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.models import MODELS, WORKLOADS
from engine.metrics import METRICS
from server.bench.options import add_arguments
from server.settings import ENVIRONMENT_PREFIX, GROUPS, ServeSettings, flag_name

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "engine.jsonl"
SIZING_DEVICES = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
"""A model's figures are those of the first on which every workload was measured, or else of the first."""
SIZING_BYTES = 10 << 30
ALERTS = DOCS.parent / "docker" / "prometheus" / "alerts.yml"
PART = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def flags() -> str:
    """Every setting of `blockserve serve`, one table a group."""
    sections = []
    for group in GROUPS:
        rows = [
            (
                _flag(name, str(extra["metavar"]), field.default),
                f"`{ENVIRONMENT_PREFIX}{name.upper()}`",
                str(extra.get("shown") or _plain(field.default)),
                f"{field.description}",
            )
            for name, field in ServeSettings.model_fields.items()
            if (extra := _extra(field.json_schema_extra))["group"] == group
        ]
        sections.append(f"### {group}\n\n" + _table(("flag", "variable", "default", "meaning"), rows))
    return "\n".join(sections)


def bench_flags() -> str:
    """Every flag of `blockserve bench`."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    # argparse has no public list of its flags. Of the help the default stands at the end, in brackets.
    rows = []
    for action in parser._actions:  # noqa: SLF001
        meaning, _, default = (action.help or "").removesuffix("]").rpartition(" [")
        values = f" {action.metavar} ..." if action.nargs == "+" else f" {action.metavar}" if action.metavar else ""
        rows.append((f"`{action.option_strings[0]}{values}`", default, meaning))
    return _table(("flag", "default", "meaning"), rows)


def metrics() -> str:
    """Every metric, by name."""
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help)
        for _, metric in sorted(METRICS.items())
    ]
    return _table(("name", "type", "labels", "meaning"), rows)


def alerts() -> str:
    """Every alert, what it means and what to do."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rows = [
        (
            f"`{rule['alert']}`",
            rule["labels"]["severity"],
            rule["annotations"]["summary"],
            rule["annotations"]["runbook"],
        )
        for group in groups
        for rule in group["rules"]
    ]
    return _table(("alert", "severity", "meaning", "what to do"), rows)


def sizing() -> str:
    """KV memory of the benchmarks' models, and what their engines did, by the last measurement of each."""
    measured: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["dtype"] == "bfloat16" and row.get("sampling", "greedy") == "greedy":
            measured[row["device"], row["model"], row["workload"]] = row
    rows = []
    for name, model in MODELS.items():
        decoder, block = model.config.block_decoder, model.config.block_length
        position = 2 * decoder.num_layers * decoder.hidden_size * 2
        whole = [each for each in SIZING_DEVICES if all((each, name, workload) in measured for workload in WORKLOADS)]
        device = (whole or SIZING_DEVICES)[0]
        results = [measured.get((device, name, workload)) for workload in WORKLOADS]
        cells = ["not measured" if row is None else f"{row['tok_s']:,.0f} ({row['rows']} rows)" for row in results]
        rows.append((name, f"{position // block:,}", f"{SIZING_BYTES * block // position:,}", device, *cells))
    lengths = [f"{each.name}: tok/s, {each.prompt_tokens} + {each.answer_tokens}" for each in WORKLOADS.values()]
    return _table(("model", "KV bytes a token", "KV tokens in 10 GiB", "GPU", *lengths), rows)


PARTS: dict[str, Callable[[], str]] = {
    "flags": flags,
    "bench-flags": bench_flags,
    "metrics": metrics,
    "alerts": alerts,
    "sizing": sizing,
}


def renew(page: str) -> str:
    """The page's text with its generated parts as the code has them now. Raises KeyError for a part of unknown name."""
    return PART.sub(lambda match: f"{match[1]}\n{PARTS[match['name']]()}\n{match[3]}", page)


def main() -> None:
    """Rewrite the pages that are behind the code."""
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = renew(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"renewed docs/{path.name}")


def _extra(value: Any) -> dict[str, Any]:
    assert isinstance(value, dict), "a setting is declared without its group"
    return value


def _flag(name: str, metavar: str, default: object) -> str:
    if default is True:
        return f"`{flag_name(name)}`, `{flag_name('no_' + name)}`"
    return f"`{flag_name(name)} {metavar}`".replace(" `", "`")


def _plain(value: object) -> str:
    return f"`{value}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
