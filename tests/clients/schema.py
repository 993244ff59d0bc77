"""`make test-schema`: requests that schemathesis makes of the server's own schema, until there are enough.

    python -m tests.clients.schema --home ~/.cache/blockserve/clients --requests 20000 --log docs/schema-tests.txt

Checked is all that schemathesis knows but one thing: that what keeps to the schema is taken. The rules between fields,
and what depends on the model, no schema can say; `programs/schema_hooks.py` makes requests that keep to those too, and
has checks of its own. Events of streams are checked against their schema.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.environments import Environment
from tests.clients.log import RunLog
from tests.clients.run import PROGRAMS, offline
from tests.serving.server_process import ServerProcess, start_server, wait_until

SCHEMATHESIS = Environment(("schemathesis>=4.30",))
EXAMPLES = 500
"""Of each operation in one run, with a seed of its own."""
FEW = ("--max-choices", "16")
"""A schema allows a thousand answers, which would take most of the time."""
STREAM_EVENTS = 300
"""Of longer streams no more is read."""


def requests_of(server: ServerProcess) -> dict[str, int]:
    """How many requests have had each status."""
    counts: dict[str, int] = {}
    for (name, labels), value in server.metrics().items():
        told = dict(labels)
        if name == "blockserve_http_requests_total" and told["handler"] not in ("/metrics", "/ready", "/health"):
            counts[told["status"]] = counts.get(told["status"], 0) + int(value)
    return counts


def run_once(server: ServerProcess, home: Path, folder: Path, seed: int) -> None:
    """One run of schemathesis; SystemExit with what it found."""
    shutil.copy(PROGRAMS / "schema_hooks.py", folder)
    (folder / "schemathesis.toml").write_text(f"max-stream-events = {STREAM_EVENTS}\n", encoding="utf-8")
    phases = "coverage,fuzzing" if seed == 0 else "fuzzing"
    command = [
        str(home / "bin" / "schemathesis"), "run", f"{server.url}/openapi.json", "--phases", phases,
        "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--max-examples", str(EXAMPLES),
        "--seed", str(seed), "--request-timeout", "60",
        "--suppress-health-check", "all", "--no-color",
    ]  # fmt: skip
    environment = offline(folder) | {"SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-12000:] + done.stderr[-2000:])


def main() -> None:
    """Run until the server has had the number of requests; exit 1 at the first run that finds something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="where the environments are")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--log", type=Path, help="write what is printed here too")
    options = parser.parse_args()
    home = options.home.expanduser().resolve() / "schemathesis"
    SCHEMATHESIS.make(home)
    log = RunLog(options.log)
    with tempfile.TemporaryDirectory(prefix="blockserve-schema-") as folder, start_server(Path(folder), *FEW) as server:
        log.begin(server.url)
        log.write(f"schemathesis {SCHEMATHESIS.version(home, 'schemathesis')}")
        seed = options.seed
        while sum(requests_of(server).values()) < options.requests:
            run_once(server, home, Path(folder), seed)
            print(f"seed {seed}: {requests_of(server)}", file=sys.stderr)
            seed += 1
        counts = requests_of(server)
        assert not any(status.startswith("5") for status in counts), counts
        log.write(f"{sum(counts.values())} requests with seeds {options.seed} to {seed - 1}, no violation")
        log.write(", ".join(f"{count} answered {status}" for status, count in sorted(counts.items())))
        wait_until(lambda: server.metric("requests_running") == server.metric("requests_waiting") == 0)
        log.write(f"{server.metric('generation_tokens_total'):.0f} tokens generated; nothing left running or waiting")
        assert server.stop() == 0, server.log.read_text()[-2000:]
    log.close()


if __name__ == "__main__":
    main()
