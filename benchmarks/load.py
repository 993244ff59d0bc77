"""A process that keeps HTTP requests open: `python -m benchmarks.load JSON`, a `Load`. Prints a `Loaded` as JSON."""

import asyncio
import random
import sys
import time

import msgspec
import uvloop

from benchmarks.http_client import HttpConnection, post


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for. Moments are monotonic seconds, which all processes of a machine share."""

    host: str
    port: int
    open_requests: int
    """One in each connection; the next follows at once."""
    prompt: list[int]
    streamed: bool
    fewest_tokens: int
    most_tokens: int
    """Answers are of any length between, so that they do not all end at once."""
    begin: float
    end: float
    seed: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What came between `begin` and `end`; answers are counted where they end."""

    answers: int
    tokens: int
    failures: int
    cpu_seconds: float
    """Of this process, all its life."""


async def run(load: Load) -> Loaded:
    """Ask from now on, and count."""
    rng = random.Random(load.seed)
    answers = tokens = failures = 0

    async def keep_asking() -> None:
        nonlocal answers, tokens, failures
        connection = await HttpConnection.open(load.host, load.port)
        while True:
            wanted = rng.randint(load.fewest_tokens, load.most_tokens)
            fields = {
                "prompt": load.prompt,
                "max_tokens": wanted,
                "temperature": 0,
                "ignore_eos": True,
                "stream": load.streamed,
            }
            response = await connection.request(post("/v1/completions", msgspec.json.encode(fields)))
            end = b"data: [DONE]\n\n" if load.streamed else b"}"
            whole = response.status == 200 and response.body.endswith(end) and b'"length"' in response.body
            if load.begin <= time.monotonic() < load.end:
                answers += whole
                tokens += wanted if whole else 0
                failures += not whole
            if not whole:
                await asyncio.sleep(0.1)

    asking = [asyncio.create_task(keep_asking()) for _ in range(load.open_requests)]
    await asyncio.sleep(load.end - time.monotonic())
    broken = sum(task.done() for task in asking)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return Loaded(answers=answers, tokens=tokens, failures=failures + broken, cpu_seconds=time.process_time())


def main() -> None:
    """Load, and say what came of it."""
    print(msgspec.json.encode(uvloop.run(run(msgspec.json.decode(sys.argv[1], type=Load)))).decode())


if __name__ == "__main__":
    main()
