"""Many streams at once, a third of them hanging up: the others get their own answer, and nothing stays behind."""

import asyncio
import json
from functools import partial
from typing import Any

import httpx

from tests.serving.server_process import ServerProcess, wait_until

STREAMS = 64
PROMPTS = ["Once upon a time", "The little dog", "One day, Tom and his mom", "Lily", "There was a big red ball in the"]


def request_body(index: int) -> dict[str, Any]:
    """A seeded request; every third runs long enough to be left midway."""
    return {
        "prompt": PROMPTS[index % len(PROMPTS)],
        "max_tokens": 400 if index % 3 == 0 else 20 + index,
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 1000 + index,
        "ignore_eos": index % 3 == 0,
    }


async def stream(client: httpx.AsyncClient, index: int, hang_up: bool) -> tuple[str, str | None]:
    """The text that came and the finish reason; leaves after three chunks if told to."""
    text, reason, chunks = "", None, 0
    async with client.stream("POST", "/v1/completions", json={**request_body(index), "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            text, reason, chunks = text + choice["text"], choice["finish_reason"], chunks + 1
            if hang_up and chunks == 3:
                break
    return text, reason


async def test_streams_survive_the_hang_ups_of_others(server: ServerProcess) -> None:
    aborted_before = server.metric("requests_total", outcome="abort")
    async with httpx.AsyncClient(
        base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=STREAMS)
    ) as client:
        streamed = await asyncio.gather(*(stream(client, index, index % 3 == 0) for index in range(STREAMS)))
        survivors = [index for index in range(STREAMS) if index % 3]
        for index in survivors:
            # One at a time: the answer that nothing else was batched with.
            alone = (await client.post("/v1/completions", json=request_body(index))).json()["choices"][0]
            assert streamed[index] == (alone["text"], alone["finish_reason"]), f"stream {index}"
    leavers = STREAMS - len(survivors)
    wait_until(lambda: server.metric("requests_total", outcome="abort") == aborted_before + leavers, what="aborts")
    gauges = ("requests_running", "requests_waiting", "kv_pages_used")
    wait_until(lambda: not any(server.metric(gauge, engine="0") for gauge in gauges), what="an empty engine")


async def test_an_unstreamed_request_that_is_left_frees_its_row(server: ServerProcess) -> None:
    aborted_before = server.metric("requests_total", outcome="abort")
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True}
        request = asyncio.create_task(client.post("/v1/completions", json=body))
        running = partial(server.metric, "requests_running", engine="0")
        await asyncio.to_thread(wait_until, lambda: running() == 1, what="a running request")
        request.cancel()
    wait_until(lambda: running() == 0, timeout=2, what="an empty batch")
    wait_until(lambda: server.metric("kv_pages_used", engine="0") == 0, timeout=2, what="no pages used")
    wait_until(lambda: server.metric("requests_total", outcome="abort") == aborted_before + 1, what="the abort counted")
