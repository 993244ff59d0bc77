"""`make test-clients`: real clients, unmodified, each in an environment of its own, against the real server.

    python -m tests.clients.run --home ~/.cache/blockserve/clients --only litellm --log docs/client-tests.txt

A client's program (`programs/`) asserts what its users would, then prints its own figures: they have to be what
/metrics gained. Programs run outside the repository and cannot reach the network. A client that cannot be installed
fails, unless it is skipped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.clients.environments import TORCH, Environment, NotInstalledError
from tests.clients.log import RunLog
from tests.clients.scores import check_samples
from tests.repository import ROOT
from tests.serving.server_process import ServerProcess, start_server

PROGRAMS = Path(__file__).parent / "programs"
MODEL = ROOT / "engine" / "default_model"
BUSY = ("--max-rows", "1", "--max-waiting", "1")
NOWHERE = "http://127.0.0.1:9"
"""In place of a proxy: what is not on this machine cannot be reached."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Client:
    """A client, how it is had, and what it does here."""

    name: str
    environment: Environment
    distribution: str
    program: str
    arguments: tuple[str, ...] = ()
    """Besides the server's URL."""
    server: tuple[str, ...] = ()
    check: Callable[[Figures], str] | None = None
    """Of figures that /metrics does not have."""


OPENAI = Environment(("openai",))
NODE = Environment(("openai",), npm=True)

CLIENTS = (
    Client("openai", OPENAI, "openai", "openai_python.py", ("all",)),
    Client("openai-busy", OPENAI, "openai", "openai_python.py", ("busy",), BUSY),
    Client("langchain-openai", Environment(("langchain-openai",)), "langchain-openai", "langchain_client.py"),
    Client("litellm", Environment(("litellm",)), "litellm", "litellm_client.py"),
    Client("openai-node", NODE, "openai", "openai_node.mjs", ("all",)),
    Client("openai-node-busy", NODE, "openai", "openai_node.mjs", ("busy",), BUSY),
    Client("lm-eval", Environment(("lm-eval[api]", TORCH)), "lm-eval", "lm_eval_client.py", check=check_samples),
    Client("guidellm", Environment(("guidellm", TORCH)), "guidellm", "guidellm_client.py", (str(MODEL),)),
    Client("aiperf", Environment(("aiperf", TORCH)), "aiperf", "aiperf_client.py", (str(MODEL),)),
)


def offline(folder: Path) -> dict[str, str]:
    """The variables of a program: those that any program needs, no way out, and a home that it may fill."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    proxies = {name: NOWHERE for proxy in ("http_proxy", "https_proxy", "all_proxy") for name in (proxy, proxy.upper())}
    hub = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    home = {"HOME": str(folder), "HF_HOME": str(folder / "huggingface")}
    local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    return kept | proxies | hub | home | local | {"PYTHONNOUSERSITE": "1", "COLUMNS": "120"}


def run_program(client: Client, home: Path, server: ServerProcess, folder: Path) -> tuple[list[str], Figures]:
    """What the program printed, and its figures. Raises AssertionError with its output if it failed."""
    program = PROGRAMS / client.program
    interpreter = client.environment.interpreter(home)
    if client.environment.npm:
        command = [str(interpreter), str(program), server.url, *client.arguments, str(home)]
    else:
        command = [str(interpreter), "-P", str(program), server.url, *client.arguments]
    done = subprocess.run(
        command, cwd=folder, env=offline(folder), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    *lines, last = done.stdout.strip().splitlines()
    figures: Figures = json.loads(last)
    return lines, figures


def compare(figures: Figures, server: ServerProcess) -> str:
    """Raise AssertionError unless the client's figures are what the server counted; says which."""
    names = {"prompt_tokens": "prompt_tokens_total", "generation_tokens": "generation_tokens_total"}
    deadline = time.monotonic() + 5
    # What a process counts is told four times a second at most.
    while True:
        told = {key: int(server.metric(name)) for key, name in names.items()}
        served = server.metric("http_requests_total", handler="/v1/completions", method="POST", status="200")
        told["completions"] = int(served)
        if told == figures or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert figures == told, f"the client has {figures}, /metrics {told}"
    return f"client = /metrics: {', '.join(f'{value} {key}' for key, value in told.items())}".replace("_", " ")


def try_client(client: Client, homes: Path, log: RunLog) -> None:
    """Make the environment, start a server, run the program, compare."""
    home = homes / (client.name.removesuffix("-busy"))
    client.environment.make(home)
    with tempfile.TemporaryDirectory(prefix="blockserve-client-") as name:
        folder = Path(name)
        (folder / "server").mkdir()
        with start_server(folder / "server", *client.server) as server:
            log.begin(server.url)
            lines, figures = run_program(client, home, server, folder)
            lines.append(compare(figures, server) if client.check is None else client.check(figures))
            assert (code := server.stop()) == 0, f"the server exited with {code}"
    log.write(f"{client.name}: {client.distribution} {client.environment.version(home, client.distribution)}")
    for line in lines:
        log.write(f"    {line}")


def try_prometheus(log: RunLog) -> None:
    """Debian's Prometheus, whose test is of the ordinary ones."""
    if shutil.which("prometheus") is None:
        raise NotInstalledError("there is no prometheus on the path")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serving/test_prometheus.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    log.write(f"prometheus: {' '.join((version.stdout + version.stderr).split()[:3]).rstrip(',')}")
    log.write("    scrapes every metric of dashboard and alerts; all rules evaluate")


def main() -> int:
    """Run the clients one after the other; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(client.name for client in CLIENTS), "prometheus"]
    parser.add_argument("--home", type=Path, required=True, help="where the environments are")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CLIENT", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="CLIENT")
    parser.add_argument("--log", type=Path, help="write what is printed here too")
    options = parser.parse_args()
    homes = options.home.expanduser().resolve()
    log, failed = RunLog(options.log), []
    runs = {client.name: partial(try_client, client, homes, log) for client in CLIENTS}
    runs["prometheus"] = partial(try_prometheus, log)
    for name in [name for name in options.only if name not in options.skip]:
        try:
            runs[name]()
        except NotInstalledError as error:
            failed.append(f"{name}: cannot be installed here: {error}")
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(f"{name}: {error}")
    for skipped in options.skip:
        log.write(f"{skipped}: skipped")
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failed:
        log.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
