"""Measures a real server over HTTP: start-up, time to first token, and tokens a second at several open streams.

    python -m benchmarks.server [--model DIR] [--streams 1 16] [--device cpu] [--name default]

Starts `blockserve serve` itself, prints a table with the floor of each throughput row, appends the rows to
benchmarks/results/server.jsonl and ends with one JSON line.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console
from rich.table import Table

from benchmarks.floor import step_floor
from benchmarks.results import append, provenance
from engine.config import ModelConfig
from engine.device import device_name
from engine.model_files import find_model

PROMPT_TOKENS, ANSWER_TOKENS = 128, 256
TTFT_REPEATS = 9
FIRST_TOKENS = 4
"""Of the answers whose first is timed."""
LOOK_S = 0.5


@dataclass(frozen=True)
class Served:
    """A running server and what it serves."""

    url: str
    pid: int
    """Of its supervisor."""
    config: ModelConfig
    seconds_to_ready: float
    seconds_to_first_token: float

    def samples(self) -> list[Sample]:
        """What /metrics says."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


@contextmanager
def served(model: str | None, device: str | None, extra: list[str]) -> Iterator[Served]:
    """Start a server, wait until it is ready and has given its first token, and stop it afterwards.

    Without `device`, `extra` says what it runs on. It logs warnings only, unless `extra` says otherwise: nobody reads a
    line for each request.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--port", str(port), "--log-level", "warning", *extra]
    if device is not None:
        arguments += ["--device", device]
    if model is not None:
        arguments += ["--model", model]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "server.cli", "serve", *arguments], stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        ready = time.perf_counter() - started
        with httpx.Client(base_url=url, timeout=60) as client:
            client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 1}).raise_for_status()
        first = time.perf_counter() - started
        yield Served(url, process.pid, ModelConfig.load(find_model(model)), ready, first)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@dataclass(frozen=True)
class Count:
    """What a server had handed on by its own counter, time after time: moments in Unix seconds, and tokens."""

    looks: list[tuple[float, float]] = field(default_factory=list)

    def look(self, server: Served) -> None:
        """Ask now. httpx.TransportError if the server does not answer."""
        before = time.time()
        tokens = sum(s.value for s in server.samples() if s.name == "blockserve_generation_tokens_total")
        self.looks.append(((before + time.time()) / 2, tokens))

    def tokens_per_second(self, start: float, seconds: float) -> float:
        """Between the first and the last look in `seconds` from `start` on. Raises ValueError if there are not two.

        Each look is up to a quarter of a second old (`FLUSH_S` of the API processes), so a rate over 8 s may be 3% off.
        """
        inside = [look for look in self.looks if start <= look[0] <= start + seconds]
        if len(inside) < 2:
            raise ValueError(f"{seconds:g} s are too short: the counter is read every {LOOK_S:g} s")
        (began, before), (ended, after) = inside[0], inside[-1]
        return (after - before) / (ended - began)


@contextmanager
def counted(server: Served) -> Iterator[Count]:
    """Read the server's counter of tokens every LOOK_S; answers that do not come are left out."""
    count, over = Count(), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            with suppress(httpx.TransportError):
                count.look(server)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield count
    finally:
        over.set()
        watching.join()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)


@dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds to its first text, and tokens by the server's own usage."""

    first: float
    tokens: int


async def stream_one(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> Answer:
    """Stream one greedy answer of exactly `max_tokens` tokens."""
    body = {
        "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    started, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - started
            tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", tokens)
    return Answer(first, tokens)


async def throughput(served_model: Served, streams: int) -> dict[str, Any]:
    """Tokens a second with `streams` always open: three requests each, closed loop; the median of three runs."""
    rng = random.Random(streams)
    vocabulary = served_model.config.vocab_size
    rates = []
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=served_model.url, timeout=600, limits=limits) as client:

        async def one_after_another() -> int:
            total = 0
            for _ in range(3):
                prompt = [rng.randrange(1, vocabulary) for _ in range(PROMPT_TOKENS)]
                total += (await stream_one(client, prompt, ANSWER_TOKENS)).tokens
            return total

        for _ in range(3):
            started = time.perf_counter()
            tokens = sum(await asyncio.gather(*(one_after_another() for _ in range(streams))))
            rates.append((tokens / (time.perf_counter() - started), time.perf_counter() - started))
    rate, seconds = sorted(rates)[1]
    return {"tok_s": round(rate, 1), "seconds": round(seconds, 2), "requests": 3 * streams, "rows": streams}


async def first_token(served_model: Served, prompt_tokens: int) -> float:
    """Median seconds to the first token of an idle server. The model's length has to hold FIRST_TOKENS more."""
    rng = random.Random(prompt_tokens)
    async with httpx.AsyncClient(base_url=served_model.url, timeout=60) as client:
        answers = []
        for _ in range(TTFT_REPEATS):
            prompt = [rng.randrange(1, served_model.config.vocab_size) for _ in range(prompt_tokens)]
            answers.append(await stream_one(client, prompt, FIRST_TOKENS))
    return statistics.median(answer.first for answer in answers)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one run."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    common = {
        "model": arguments.name,
        "dtype": arguments.dtype,
        "device": device_name(device),
        "devices": 1,
        **provenance(),
    }
    with served(arguments.model, arguments.device, ["--dtype", arguments.dtype]) as running:
        rows: list[dict[str, Any]] = [
            {
                "bench": "startup", "seconds_to_ready": round(running.seconds_to_ready, 2),
                "seconds_to_first_token": round(running.seconds_to_first_token, 2), **common,
            }
        ]  # fmt: skip
        for prompt_tokens in arguments.prompts or (8, running.config.max_length - 64):
            seconds = asyncio.run(first_token(running, prompt_tokens))
            rows.append(
                {"bench": "latency", "workload": f"{prompt_tokens} in", "ttft_ms": round(seconds * 1e3, 2), **common}
            )
        measured = [asyncio.run(throughput(running, streams)) for streams in arguments.streams]
    for streams, figures in zip(arguments.streams, measured, strict=True):
        context = (PROMPT_TOKENS + ANSWER_TOKENS // 2) // running.config.block_length
        # The engine pads smaller batches to 8 rows, but the floor is what the work itself costs.
        step = step_floor(running.config, streams, context, device, dtype)
        floor = streams * running.config.block_length / step
        rows.append(
            {
                "bench": "http", "workload": f"{PROMPT_TOKENS} in {ANSWER_TOKENS} out", "streamed": True,
                "api_processes": 1, "open_requests": streams, **figures, "floor_tok_s": round(floor, 1), **common,
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"{rows[0]['model']} on {rows[0]['device']}, {rows[0]['dtype']}, commit {rows[0]['commit']}")
    for column in ("what", "measured", "floor", "of the floor"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        if row["bench"] == "startup":
            table.add_row("start to ready", f"{row['seconds_to_ready']} s", "", "")
            table.add_row("start to first token", f"{row['seconds_to_first_token']} s", "", "")
        elif row["bench"] == "latency":
            table.add_row(f"time to first token, {row['workload']}, idle", f"{row['ttft_ms']} ms", "", "")
        else:
            share = f"{row['tok_s'] / row['floor_tok_s']:.0%}"
            what = f"{row['open_requests']} streams, {row['workload']}"
            table.add_row(what, f"{row['tok_s']:.0f} tok/s", f"{row['floor_tok_s']:.0f} tok/s", share)
    Console().print(table)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model directory (default: the embedded model)")
    parser.add_argument("--name", default="default", help="what the rows call the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--prompts", type=int, nargs="+", help="tokens of the prompts whose first token is timed [8 and a long one]"
    )
    rows = measure(parser.parse_args())
    show(rows)
    path = append("server", rows)
    print(json.dumps({"appended_to": str(path.name), "rows": rows}))


if __name__ == "__main__":
    main()
