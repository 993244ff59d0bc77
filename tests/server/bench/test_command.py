"""`blockserve bench` as a whole: real worker processes, over HTTP, against the application and the canned server."""

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import EngineRejectedError
from server import cli
from server.bench.canned_server import BLOCK, Connection, Streams
from server.bench.command import BenchError, canned_servers, measure_all
from server.bench.http_client import Address, HttpConnection, post
from server.bench.options import OptionError, Plan, add_arguments, read_options
from server.bench.worker import read_usage
from tests.server.fakes import FakeEngine, Harness
from tests.server.test_over_http import listening


def plan(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(["--workers", "1", "--warm-up", "0", *arguments]))


async def bench(port: int, *arguments: str) -> list[dict[str, Any]]:
    return await measure_all(plan("--url", f"http://127.0.0.1:{port}/v1", *arguments))


@pytest.mark.parametrize("ways", [["--concurrency", "3"], ["--rate", "200"], ["--concurrency", "3", "--no-stream"]])
async def test_tokens_and_answers_are_those_of_the_server(ways: list[str]) -> None:
    harness = Harness()
    async with listening(harness) as server:
        (row,) = await bench(
            server.port,
            *ways,
            "--requests",
            "20",
            "--prompt-tokens",
            "5-9",
            "--output-tokens",
            "10",
            "--slo",
            "e2e=60s",
        )
    requests = harness.engine.requests
    assert (row["answers"], row["failures"], row["unfinished"], row["model"]) == (20, 0, 0, "fox")
    assert row["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in requests)
    assert {len(request.prompt_token_ids) for request in requests} <= set(range(5, 10))
    counted = harness.count().counters
    assert row["tokens"] == counted[("generation_tokens_total",)] == 200
    assert row["tok_s"] == pytest.approx(200 / row["seconds"], rel=0.01)
    assert row["requests_s"] == pytest.approx(20 / row["seconds"], rel=0.01)
    assert (row["goodput_share"], row["goodput_requests_s"]) == (1.0, row["requests_s"])
    assert (row["ttft_ms"] is None) == ("--no-stream" in ways)
    assert 0 < row["e2e_ms"]["p50"] <= row["e2e_ms"]["p90"] <= row["e2e_ms"]["p99"]


async def test_several_workers_share_a_load() -> None:
    harness = Harness()
    async with listening(harness) as server:
        rows = await bench(server.port, "--workers", "2", "--concurrency", "1", "3", "--requests", "9")
    assert [(row["workers"], row["answers"]) for row in rows] == [(1, 9), (2, 9)]
    prompts = [request.prompt_token_ids for request in harness.engine.requests]
    assert len(set(prompts)) == len(prompts) == 18


async def test_a_time_is_measured() -> None:
    async with listening(Harness()) as server:
        began = time.time()
        (row,) = await bench(server.port, "--concurrency", "2", "--seconds", "0.5", "--warm-up", "0.3")
    assert row["seconds"] == 0.5
    assert began + 0.3 <= row["measured_from"] <= time.time() - 0.5
    assert row["answers"] > 5
    assert row["unfinished"] <= 2


async def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi", "max_tokens": 4}\n', encoding="utf-8")
    harness = Harness()
    async with listening(harness) as server:
        (row,) = await bench(server.port, "--concurrency", "1", "--requests", "3", "--prompts", str(path))
    assert row["tokens"] == 12
    assert {request.params.ignore_eos for request in harness.engine.requests} == {True}


async def test_failures_are_counted_by_what_they_were() -> None:
    harness = Harness()
    harness.engine.refuse = EngineRejectedError("queue_full", "the queue is full")
    async with listening(harness) as server:
        (row,) = await bench(server.port, "--concurrency", "2", "--requests", "4", "--slo", "ttft=1s")
    assert (row["answers"], row["failures"], row["errors"]) == (0, 4, {"status 429": 4})
    assert (row["tok_s"], row["goodput_share"], row["e2e_ms"]) == (0.0, 0.0, None)


async def test_requests_that_take_too_long() -> None:
    async with listening(Harness(FakeEngine(script=None))) as server:
        (row,) = await bench(server.port, "--concurrency", "2", "--requests", "2", "--timeout", "0.2")
    assert row["errors"] == {"timeout": 2}


async def test_a_key_is_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    async with listening(Harness(api_key=("sk-1",))) as server:
        (row,) = await bench(server.port, "--api-key", "sk-1", "--concurrency", "1", "--requests", "2")
        assert row["answers"] == 2
        with pytest.raises(BenchError, match="it wants an API key"):
            await bench(server.port)


async def test_nobody_listens() -> None:
    async with listening(Harness()) as server:
        port = server.port
    with pytest.raises(BenchError, match="does not answer"):
        await bench(port)
    (row,) = await bench(port, "--model", "fox", "--concurrency", "1", "--requests", "1")
    assert row["errors"] == {"connection refused": 1}


async def test_the_ceiling_needs_no_server_and_marks_what_it_binds() -> None:
    (alone,) = await measure_all(plan("--url", "127.0.0.1:9", "--ceiling", "--concurrency", "4", "--seconds", "0.5"))
    assert alone["url"] == "canned"
    assert alone["failures"] == 0
    assert alone["tok_s"] > 1000
    # As many have begun before it as end after it.
    assert alone["tokens"] == pytest.approx(alone["answers"] * 128, rel=0.2)
    harness = Harness()
    async with listening(harness) as server:
        (row,) = await bench(server.port, "--with-ceiling", "--concurrency", "4", "--seconds", "0.5")
    assert row["ceiling_tok_s"] > row["tok_s"] > 0
    assert row["client_bound"] == (row["tok_s"] >= 0.7 * row["ceiling_tok_s"])


@contextlib.asynccontextmanager
async def canned(pace: float = 0.0) -> AsyncIterator[HttpConnection]:
    """A connection to a canned server in this process."""
    streams = Streams(pace)
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: Connection(streams), "127.0.0.1", 0) as server:
        connection = await HttpConnection.open(Address("127.0.0.1", server.sockets[0].getsockname()[1]))
        yield connection
        connection.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("tokens", [1, BLOCK, BLOCK + 1, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_canned_server_says_what_it_is_asked_for(tokens: int, stream: bool) -> None:
    body = json.dumps({"max_tokens": tokens, "stream": stream}, separators=(",", ":")).encode()
    async with canned() as connection:
        for _ in range(2):
            response = await connection.request(post(Address("x", 1).head("POST", "/v1/completions", {}), body))
            assert read_usage(response, streamed=stream).completion_tokens == tokens
            assert response.body.count(b'"text":') == (-(-tokens // BLOCK) if stream else 1)


async def test_the_canned_server_keeps_its_pace() -> None:
    body = json.dumps({"max_tokens": 5 * BLOCK, "stream": True}, separators=(",", ":")).encode()
    async with canned(0.02) as connection:
        # As other clients spell it.
        head = Address("x", 1).head("POST", "/v1/completions", {})
        data = post(head, body).replace(b"content-length", b"Content-Length")
        began = time.monotonic()
        response = await connection.request(data)
    assert response.body.count(b'"text":') == 5
    # Never early; a machine that is busy elsewhere may be late, and then two come together.
    assert response.deliveries[0] - began >= 0.019
    assert response.deliveries[-1] - began >= 0.099


async def test_canned_servers_end_with_their_context() -> None:
    async with canned_servers(2) as addresses:
        assert len({address.port for address in addresses}) == 2
    with pytest.raises(ConnectionRefusedError):
        await HttpConnection.open(addresses[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "ftp://x"],
        ["--concurrency", "0"],
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--seconds", "0"],
        ["--requests", "0"],
        ["--requests", "5", "--seconds", "5"],
        ["--prompt-tokens", "x"],
        ["--prompts", "no/such/file"],
        ["--slo", "x=1"],
        ["--slo", "ttft=1s", "--no-stream"],
        ["--ceiling", "--rate", "5"],
        ["--vocab-size", "1"],
        ["--api-key", "two\nlines"],
    ],
)
def test_flags_that_do_not_fit(arguments: list[str]) -> None:
    with pytest.raises(OptionError):
        plan(*arguments)


def test_the_command_shows_and_keeps_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn = tmp_path / "bench.jsonl", tmp_path / "bench.png"
    arguments = ["bench", "--ceiling", "--workers", "1", "--requests", "8", "--concurrency", "1", "2"]
    for _ in range(2):
        assert cli.main([*arguments, "--json", str(kept), "--plot", str(drawn), "--slo", "e2e=9s"]) == 0
    out, err = capsys.readouterr()
    assert "1 open" in out
    assert "TTFT" in out
    assert err == ""
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [row["concurrency"] for row in rows] == [1, 2, 1, 2]
    assert {row["answers"] for row in rows} == {8}
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--concurrency", "0"]) == 2
    assert cli.main(["bench", "--plot", "plot.doc"]) == 2
    assert cli.main(["bench", "--url", "127.0.0.1:9"]) == 1
    nowhere = tmp_path / "none" / "file"
    assert cli.main(["bench", "--ceiling", "--workers", "1", "--requests", "1", "--json", str(nowhere)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["blockserve bench"] * 4
    assert "--concurrency" in err[0]
    assert "No such file" in err[3]


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", "plot.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
