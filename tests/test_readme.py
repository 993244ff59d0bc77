"""The README's commands, run in order in a copy of the checkout, as a reader would."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.repository import ROOT, project_files
from tests.serving.server_process import free_port

START_SECONDS = 240
BLOCK_SECONDS = 600


class Block(NamedTuple):
    """A fenced block that readers run."""

    language: str
    text: str


def readme_blocks() -> list[Block]:
    """Shell and Python blocks, in order."""
    found = re.findall(
        r"^```(sh|python)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [Block(*block) for block in found]


def copy_checkout(target: Path) -> None:
    """The project's files, and this interpreter's environment where `make` would make one.

    The environment is a view of the real one, with the stamps that tell `make` that all is installed.
    """
    for path in project_files():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    view = target / ".venv"
    view.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith(".blockserve"):
            (view / entry.name).symlink_to(entry)
    for stamp in (".blockserve-runtime", ".blockserve-dev"):
        (view / stamp).touch()


@contextmanager
def serving(command: Block, checkout: Path, environment: dict[str, str], url: str) -> Iterator[None]:
    """Run the block in the background until the server is ready; Ctrl-C in the end."""
    log = checkout / "serve.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ["bash", "-c", command.text],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            wait_until_ready(process, url, log)
            yield
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
    assert "Traceback" not in log.read_text()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until /ready is 200; AssertionError if the process ends first or time runs out."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def run(block: Block, checkout: Path, environment: dict[str, str]) -> str:
    """Run a block to its end; its output."""
    if block.language == "sh":
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    else:
        command = [str(checkout / ".venv/bin/python"), "-c", block.text]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=BLOCK_SECONDS, check=False
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_works_as_written(tmp_path: Path) -> None:
    checkout, port = tmp_path / "blockserve", free_port()
    copy_checkout(checkout)
    url = f"http://127.0.0.1:{port}"
    # PYTHONPATH: the environment has the project installed from the original checkout, but the copy is what is tried.
    # The suite cannot contain itself: `make test` only collects it.
    unset = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PORT": str(port), "PYTHONPATH": str(checkout), "PYTEST_ADDOPTS": "--collect-only -q"}
    start, curl, *others = [
        block._replace(text=block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")) for block in readme_blocks()
    ]
    assert start.text.startswith("make serve")
    assert curl.text.startswith("curl ")
    assert others[-1].text.startswith("make test")
    with serving(start, checkout, environment, url):
        # The only program that a system may be without: those of the other blocks come with the project.
        if shutil.which("curl") is not None:
            streamed = run(curl, checkout, environment)
            assert streamed.endswith("data: [DONE]\n\n")
            assert '"error"' not in streamed
        openai, offline, generate, _, collected = (run(block, checkout, environment) for block in others)
    assert len(openai.split()) > 10
    assert offline.count("[length]") + offline.count("[stop]") == 2
    assert len(generate.split()) > 10
    assert json.loads((checkout / "answers.jsonl").read_text())["response"]["status_code"] == 200
    assert "tests/test_readme.py" in collected
