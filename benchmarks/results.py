"""How a figure is kept: one JSON object a line, appended by the benchmark that measured it."""

import json
import os
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """What every figure names: commit, versions, date."""
    return {
        "commit": _commit(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append rows to results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """What the environment variable BLOCKSERVE_COMMIT says, for a machine that got a copy of the files.

    Otherwise the checked-out commit, with "+" where tracked source files differ from it.
    """
    if told := os.environ.get("BLOCKSERVE_COMMIT"):
        return told

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
