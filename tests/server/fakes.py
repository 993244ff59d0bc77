"""An engine that answers from a script, and the application around it."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI
from tokenizers import processors

from engine.client import EngineUnavailableError
from engine.messages import MetricsIncrement, ServiceState
from engine.metrics import MetricsRecorder
from engine.tokenizer import Tokenizer
from engine.types import (
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationRequest,
    ScoreRequest,
    Timing,
    TokenLogprobs,
    unpack_tokens,
)
from server.app import create_app
from server.app_state import AppState
from server.settings import ServeSettings
from server.version import VersionInfo
from tests.engine.tokenizers_of_tests import END_OF_TEXT, byte_level

EOS = 0
REPLY = "The fox said: naïve 漢字 😀!"
INFO = EngineInfo(
    model="fox",
    vocab_size=320,
    block_length=4,
    max_length=256,
    eos_token_id=EOS,
    device="cpu",
    dtype="float32",
    max_rows=8,
    pages=64,
    page_size=16,
    kv_bytes=1 << 20,
    parameters=1000,
)
TIMING = Timing(queue=0.25, prefill=0.5)


@cache
def tokenizer(*, adds_special_tokens: bool = False) -> Tokenizer:
    """The byte-level tokenizer of the tests; id 0 ends a text, and begins one if special tokens are added."""
    model = byte_level()
    if adds_special_tokens:
        model.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, EOS)]
        )
    return Tokenizer(model, END_OF_TEXT)


def told(request: GenerationRequest, token_ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """Logprobs that depend on the token alone: it is the likeliest, then come those behind it by ids."""
    top = request.params.logprobs
    if top is None:
        return ()
    return tuple(logprobs_of(token, top) for token in token_ids)


def logprobs_of(token: int, top: int) -> TokenLogprobs:
    ids = tuple((token + place) % INFO.vocab_size for place in range(top))
    return TokenLogprobs(-token / 128, ids, tuple(-token / 128 - place for place in range(top)))


def score_delta(score: ScoreRequest) -> Delta:
    logprobs = tuple(logprobs_of(token, score.top) for token in unpack_tokens(score.text)[1:])
    return Delta(request_id=score.request_id, finish_reason="length", logprobs=logprobs)


def reply_deltas(request: GenerationRequest, text: str = REPLY) -> list[Delta]:
    """What an engine would deliver if the model always said `text` and ended there: blocks of four tokens."""
    tokens = [*tokenizer().encode(text), EOS]
    ended = len(tokens) <= request.params.max_tokens
    tokens = tokens[: request.params.max_tokens]
    deltas = []
    for start in range(0, len(tokens), 4):
        last = start + 4 >= len(tokens)
        deltas.append(
            Delta(
                request_id=request.request_id,
                token_ids=tuple(tokens[start : start + 4]),
                logprobs=told(request, tokens[start : start + 4]),
                finish_reason=("stop" if ended else "length") if last else None,
                timing=None if start else TIMING,
            )
        )
    return deltas


class FakeAnswers:
    """Open answers of one group; tests feed them."""

    def __init__(self, requests: Sequence[GenerationRequest], scores: Sequence[ScoreRequest] = ()) -> None:
        self.requests = list(requests)
        self.scores = list(scores)
        self.open = {request.request_id for request in requests} | {score.request_id for score in scores}
        self.aborted: list[int] = []
        self.arrived: asyncio.Queue[list[Delta] | Exception] = asyncio.Queue()

    def feed(self, *steps: list[Delta] | Exception) -> None:
        """Let these steps arrive."""
        for step in steps:
            self.arrived.put_nowait(step)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        while self.open:
            step = await self.arrived.get()
            if isinstance(step, Exception):
                raise step
            step = [delta for delta in step if delta.request_id in self.open]
            self.open -= {delta.request_id for delta in step if delta.finish_reason is not None}
            yield step

    def limit_unread(self, steps: int, exceeded: Callable[[], None]) -> None:
        self.most_unread, self.exceeded = steps, exceeded

    def abort(self, request_ids: Sequence[int] | None = None) -> None:
        gone = self.open if request_ids is None else self.open & set(request_ids)
        self.aborted += sorted(gone)
        self.open = self.open - gone
        self.arrived.put_nowait([])


class FakeEngine:
    """Answers every request with `script`, one delta of each a step; None leaves the answers to the test."""

    def __init__(self, script: Callable[[GenerationRequest], list[Delta]] | None = reply_deltas) -> None:
        self.script = script
        self.info: EngineInfo | None = INFO
        self.up = True
        self.load = EngineLoad()
        self.groups: list[FakeAnswers] = []
        self.score_after = 1
        """Steps before the one that brings scores."""
        self.refuse: Exception | None = None
        self.accepts = asyncio.Event()
        self.accepts.set()
        self.cancelled_submits = 0
        self.submitted = asyncio.Event()
        self._ids = itertools.count(100)

    def next_request_id(self) -> int:
        return next(self._ids)

    async def submit(self, requests: Sequence[GenerationRequest], scores: Sequence[ScoreRequest] = ()) -> FakeAnswers:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.set()
        try:
            await self.accepts.wait()
        except asyncio.CancelledError:
            self.cancelled_submits += 1
            raise
        answers = FakeAnswers(requests, scores)
        self.groups.append(answers)
        if self.script is not None:
            steps = [
                [delta for delta in step if delta is not None]
                for step in itertools.zip_longest(*(self.script(request) for request in requests))
            ]
            steps += [[] for _ in range(self.score_after + 1 - len(steps))]
            for score in scores:
                steps[self.score_after].append(score_delta(score))
            answers.feed(*steps)
        return answers

    def die(self) -> None:
        """End every open answer as a lost connection does."""
        for answers in self.groups:
            answers.feed(EngineUnavailableError("the engine that served this request has stopped; try again"))

    @property
    def requests(self) -> list[GenerationRequest]:
        """All that was submitted."""
        return [request for answers in self.groups for request in answers.requests]


class Counted:
    """What a recorder sent, added up as the registry does."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, ...], float] = {}
        self.observations: dict[str, int] = {}
        self.sums: dict[str, float] = {}

    def add(self, increment: MetricsIncrement) -> None:
        for name, labels, value in increment.counters:
            self.counters[(name, *labels)] = self.counters.get((name, *labels), 0) + value
        for name, _, counts, total in increment.histograms:
            self.observations[name] = self.observations.get(name, 0) + sum(counts)
            self.sums[name] = self.sums.get(name, 0) + total


class Harness:
    """An application over a fake engine."""

    def __init__(self, engine: FakeEngine | None = None, spoken: Tokenizer | None = None, **settings: Any) -> None:
        self.engine = engine or FakeEngine()
        self.counted = Counted()
        self.rendered: list[bool] = []
        self.render_error: Exception | None = None
        self.state = AppState(
            engine=self.engine,
            tokenizer=spoken or tokenizer(),
            settings=ServeSettings(**{"served_model_name": ("fox", "fox-alias"), **settings}),
            metrics=MetricsRecorder(self.counted.add),
            render_metrics=self.render,
            service=ServiceState(healthy=True, engines_up=1, draining=False),
            started=1_700_000_000,
            version=VersionInfo(version="1.2.3", commit="abc"),
        )
        self.app: FastAPI = create_app(self.state)

    async def render(self, openmetrics: bool) -> tuple[str, bytes]:
        self.rendered.append(openmetrics)
        if self.render_error is not None:
            raise self.render_error
        return "text/plain; version=0.0.4", b"# HELP x\n"

    def client(self) -> httpx.AsyncClient:
        # An exception that escapes the application fails the test.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    async def complete(self, **fields: Any) -> httpx.Response:
        """POST a completion; `prompt` is "Hi" unless given."""
        async with self.client() as client:
            return await client.post("/v1/completions", json={"prompt": "Hi", **fields})

    def count(self) -> Counted:
        """All that was counted so far."""
        self.state.metrics.flush()
        return self.counted


def events(body: str) -> list[Any]:
    """The events of a stream: decoded JSON, and "[DONE]" as text. Fails where the framing is not exact."""
    assert body.endswith("\n\n")
    parts = body[:-2].split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part if (part := one[6:]) == "[DONE]" else json.loads(part) for one in parts]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)
