"""Rules about the repository as a whole, each checked rather than remembered."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.repository import ROOT, project_files

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
TORCH_FREE_ENTRIES = ("server.supervisor", "server.app", "server.api_process", "server.cli", "engine", "docs.generate")
TORCH_MODULES = {
    "adjustments",
    "batch_tables",
    "core",
    "decode_graphs",
    "decode_step",
    "device",
    "graph_pool",
    "kv_cache",
    "llm",
    "model",
    "options",
    "out_of_memory",
    "prefill_graphs",
    "prefill_step",
    "rehearsal",
    "runner",
    "scorer",
    "staging",
    "weights",
}
"""Of the engine. Its worker imports torch late, and everything else not at all."""
SERVING_PACKAGES = ("server", "engine", "kernels")


def text_files() -> list[Path]:
    """Files that people read."""
    suffixes = {
        ".cfg",
        ".css",
        ".html",
        ".js",
        ".json",
        ".jsonl",
        ".md",
        ".py",
        ".sh",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
        "",
    }
    return [path for path in project_files() if path.suffix in suffixes]


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PYTHON_FILES = [path for path in project_files() if path.suffix == ".py"]


def name_of(path: Path) -> str:
    """The path as people write it."""
    return str(path.relative_to(ROOT))


def read_project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_files_are_found() -> None:
    names = {name_of(path) for path in PYTHON_FILES}
    assert {"engine/scheduler.py", "server/supervisor.py", "kernels/sampler.py", "tests/test_architecture.py"} <= names


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON_FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in PYTHON_FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}: {node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize("module", TORCH_FREE_ENTRIES)
def test_no_torch_behind(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{'torch', 'triton', 'safetensors.torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_contract_knows_every_torch_free_module() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    contract = next(contract for contract in contracts if contract["name"].startswith("The torch-free part"))
    listed = {name.removeprefix("engine.") for name in contract["source_modules"]}
    modules = {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__", "worker"}
    assert listed == modules - TORCH_MODULES, "list a new module in pyproject.toml or in TORCH_MODULES"


def test_no_pickle_anywhere() -> None:
    pattern = re.compile(r"^\s*(import|from) (c?[Pp]ickle|shelve|marshal|dill|joblib)\b|\btorch\.load\(", re.MULTILINE)
    served = [path for path in PYTHON_FILES if name_of(path).split("/")[0] in SERVING_PACKAGES]
    assert [name_of(path) for path in served if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_no_path_of_a_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(work|home|root|Users)/|\.\./shared\b")
    found = [name_of(path) for path in text_files() if pattern.search(path.read_text(encoding="utf-8"))]
    assert [name for name in found if name != name_of(Path(__file__))] == []


def test_every_package_is_installed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in PYTHON_FILES}
    ours = {".".join(folder.parts) for folder in folders if folder.parts and folder.parts[0] in SERVING_PACKAGES}
    assert set(read_project()["tool"]["setuptools"]["packages"]) == ours


def test_version_is_the_newest_of_the_changelog() -> None:
    project = read_project()["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert versions[0] == project["version"]
    groups = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Fixed"}


def test_constraints_leave_torch_to_the_machine() -> None:
    project = read_project()["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    torch = [line for line in lines if re.match(r"torch\b", line)]
    assert torch == ["torch>=2.11,<2.14"]
    assert torch[0] in project["dependencies"]
    assert [line for line in lines if line not in torch and not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_constraints_pin_every_dependency() -> None:
    project = read_project()["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    pinned = {_normal(re.split(r"[=<>]", line)[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name for item in wanted if (name := _normal(re.split(r"[=<>\[;]", item)[0])) not in pinned} == {
        "blockserve"
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


def test_pre_commit_downloads_nothing() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"repo: (.+)", text)) == {"local"}


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_documents_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    top = "server|engine|kernels|benchmarks|training|tests|docs|docker"
    named = set(re.findall(rf"(?<![\w./-])((?:{top})/[\w./-]*[\w/])", text))
    # Against what git has, not the disk: an empty folder is not in a clone.
    files = {name_of(path) for path in project_files()}
    known = files | {str(folder) for name in files for folder in Path(name).parents}
    assert {name for name in named if name.rstrip("/") not in known} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#]+[^)]*)\)", text)}
    assert {link for link in targets if not ((ROOT / page).parent / link).exists()} == set()


def test_the_life_of_a_request_names_its_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    life = text.split("## The life of a request")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. .*(?:\n   .*)*", life, re.MULTILINE)
    assert len(steps) >= 8
    assert [step for step in steps if not re.search(r"`[\w/]+\.py`", step)] == []
