"""Random requests over HTTP: as many at once as an engine takes, or as they come."""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

LONGEST_PROMPT, LONGEST_ANSWER = 512, 384
STREAMED = 1 / 8
SEEDS = 1 << 62
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    stream: bool

    @property
    def body(self) -> dict[str, object]:
        """Its JSON."""
        return {
            "prompt": list(self.prompt), "max_tokens": self.max_tokens, "temperature": self.temperature,
            "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed, "ignore_eos": self.ignore_eos,
            "stream": self.stream,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A whole answer; an end-of-text token that ended it is its last one."""

    token_ids: tuple[int, ...]
    finish_reason: str


class RefusedError(Exception):
    """429: the queue is full."""


class FailedError(Exception):
    """Anything else than a whole answer."""


def asks(seed: int, vocab_size: int, *, truncates: bool) -> Iterator[Ask]:
    """Requests without end: lengths of every size, greedy and sampled; with top-p and top-k too if `truncates`."""
    rng = random.Random(seed)
    filters = [(1.0, 0), (0.9, 0), (1.0, 40), (0.95, 100)] if truncates else [(1.0, 0)]
    while True:
        top_p, top_k = rng.choice(filters)
        length = rng.randint(1, LONGEST_PROMPT)
        yield Ask(
            prompt=tuple(rng.randrange(1, vocab_size) for _ in range(length)),
            max_tokens=rng.randint(1, LONGEST_ANSWER),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=top_p,
            top_k=top_k,
            seed=rng.randrange(SEEDS),
            ignore_eos=rng.random() < 0.5,
            stream=rng.random() < STREAMED,
        )


class Client:
    """Asks a server, in connections that it keeps until it is closed."""

    def __init__(self, url: str, eos_token_id: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits)
        self._eos = eos_token_id

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def ask(self, ask: Ask) -> Answer:
        """The whole answer. Raises RefusedError or FailedError."""
        try:
            text, reason = await (self._stream(ask) if ask.stream else self._post(ask))
        except httpx.TransportError as error:
            raise FailedError(f"{type(error).__name__}: {error}") from None
        token_ids = tuple(int(word) for word in text.split())
        return Answer((*token_ids, self._eos) if reason == "stop" else token_ids, reason)

    async def _post(self, ask: Ask) -> tuple[str, str]:
        response = await self._http.post("/v1/completions", json=ask.body)
        _raise_for_status(response.status_code, response.text)
        choice = response.json()["choices"][0]
        return choice["text"], choice["finish_reason"]

    async def _stream(self, ask: Ask) -> tuple[str, str]:
        text, reason = [], None
        async with self._http.stream("POST", "/v1/completions", json=ask.body) as response:
            if response.status_code != httpx.codes.OK:
                _raise_for_status(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise FailedError(event["error"]["message"])
                text.append(event["choices"][0]["text"])
                reason = event["choices"][0]["finish_reason"]
        if reason is None:
            raise FailedError("the stream ended before the answer did")
        return "".join(text), reason


def _raise_for_status(status: int, text: str) -> None:
    if status == httpx.codes.TOO_MANY_REQUESTS:
        raise RefusedError
    if status != httpx.codes.OK:
        raise FailedError(f"{status}: {text[:200]}")


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """"answered", "aborted", "refused", "failed"."""
    tokens: int = 0
    failures: list[tuple[float, str]] = field(default_factory=list)
    """When (monotonic seconds) and why."""
    seconds: list[float] = field(default_factory=list)
    """How long each answer took."""


class Sample:
    """A random sample, of a given size at most, of all that is offered to it."""

    def __init__(self, size: int, seed: int) -> None:
        self._kept: list[tuple[Ask, Answer]] = []
        self._size = size
        self._offered = 0
        self._rng = random.Random(seed)

    def shuffled(self) -> list[tuple[Ask, Answer]]:
        """What was kept, in random order."""
        return self._rng.sample(self._kept, len(self._kept))

    def offer(self, ask: Ask, answer: Answer) -> None:
        """Keep it with the probability that makes every one offered equally likely to be kept."""
        self._offered += 1
        if len(self._kept) < self._size:
            self._kept.append((ask, answer))
        elif (place := self._rng.randrange(self._offered)) < self._size:
            self._kept[place] = (ask, answer)


async def one(client: Client, ask: Ask, tally: Tally) -> Answer | None:
    """Ask once and count what became of it; None where there is no answer."""
    started = time.monotonic()
    try:
        answer = await client.ask(ask)
    except RefusedError:
        tally.outcomes["refused"] += 1
    except FailedError as error:
        tally.outcomes["failed"] += 1
        tally.failures.append((time.monotonic(), str(error)))
    else:
        tally.outcomes["answered"] += 1
        tally.tokens += len(answer.token_ids)
        tally.seconds.append(time.monotonic() - started)
        return answer
    return None


@dataclass(frozen=True)
class Capacity:
    """What a server does with more requests open than it has rows."""

    answers_s: float
    tokens_s: float
    answer_seconds: float
    """Median time of an answer."""


async def capacity(client: Client, source: Iterator[Ask], open_requests: int, window: float, most: int) -> Capacity:
    """Measure with so many requests always open, over the last two windows of `window` seconds.

    There are `most` windows, or fewer where two in a row differ by less than 15 %: kernels are compiled and graphs
    captured then. Raises FailedError if any request fails.
    """
    total = Tally()

    async def one_after_another() -> None:
        while True:
            await one(client, next(source), total)

    workers = [asyncio.create_task(one_after_another()) for _ in range(open_requests)]
    answers, tokens = [0], [0]
    try:
        while len(tokens) <= most and not _steady(tokens):
            await asyncio.sleep(window)
            answers.append(total.outcomes["answered"])
            tokens.append(total.tokens)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    if total.outcomes["failed"]:
        raise FailedError(f"while the capacity was measured: {total.failures[0][1]}")
    if tokens[-1] == tokens[-3]:
        raise FailedError("while the capacity was measured: no answer came")
    seconds = statistics.median(total.seconds[answers[-3] :])
    return Capacity((answers[-1] - answers[-3]) / (2 * window), (tokens[-1] - tokens[-3]) / (2 * window), seconds)


def _steady(totals: list[int]) -> bool:
    if len(totals) < 3 or totals[-2] == totals[-3]:
        return False
    return abs((totals[-1] - totals[-2]) / (totals[-2] - totals[-3]) - 1) < 0.15


async def poisson(
    client: Client,
    source: Iterator[Ask],
    rate: float,
    seconds: float,
    abort_within: float,
    seed: int,
    tally: Tally,
    sample: Sample,
) -> None:
    """Ask `rate` times a second, at random moments, for `seconds`; returns when all requests have ended.

    One in ten is given up after a random time of up to `abort_within` seconds, if it is not answered by then.
    """
    rng = random.Random(seed)
    open_tasks: set[asyncio.Task[None]] = set()

    async def perhaps_aborted(ask: Ask, patience: float | None) -> None:
        try:
            async with asyncio.timeout(patience):
                answer = await one(client, ask, tally)
        except TimeoutError:
            tally.outcomes["aborted"] += 1
            return
        if answer is not None:
            sample.offer(ask, answer)

    due, end = time.monotonic(), time.monotonic() + seconds
    while (due := due + rng.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        patience = rng.uniform(0, abort_within) if rng.random() < 0.1 else None
        task = asyncio.create_task(perhaps_aborted(next(source), patience))
        open_tasks.add(task)
        task.add_done_callback(open_tasks.discard)
    if open_tasks:
        await asyncio.gather(*open_tasks)
