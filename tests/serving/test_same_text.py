"""For a seed there is one text: from a server, whole or streamed by block or by token, and from the offline API."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from engine import LLM, SamplingParams
from engine.llm import Completion
from tests.engine.borders import complete, expected
from tests.server.answers import CHUNK_UNITS, USAGE_IN_STREAMS, joined
from tests.server.fakes import events
from tests.serving.server_process import start_server
from tests.serving.split_characters import BLOCK, split_pairs, write_model

pytestmark = pytest.mark.serving

WEIGHTS_SEED = 1
PROMPT = [b"a", b"\xc3\xa9", b"\xe6\xbc\xa2", b"\xc3", b"\xa9a", b"\xf0\x9f"]
"""Tokens of which the last ends neither a block nor a character."""
MAX_TOKENS = 21
CHOICES = 3
TOP = 3
SEEDS = 100
"""Tried for answers that are worth asking for."""
CONCURRENCY = 16
LOGPROB_TOLERANCE = 1e-4
"""Rows that are batched otherwise are rounded otherwise."""

Arrays = dict[str, list[Any]]
"""The logprobs of a choice."""


class Combination(NamedTuple):
    """One way to ask."""

    n: int
    stop: str
    """A name of Offline.stops."""
    include: bool
    echo: bool
    logprobs: int | None
    unit: str
    """Of the chunks of the server that is asked."""
    stream: bool


@dataclass
class Offline:
    """The model in this process, and a seed whose answers have what is needed."""

    directory: Path
    """The model's."""
    llm: LLM
    contents: list[bytes]
    """What each token stands for."""
    prompt: list[int]
    seed: int
    free: list[Completion]
    """The answers of that seed and those behind it, without a stop string."""
    stops: dict[str, tuple[str, ...]]

    def answers(self, stop: str) -> list[Completion]:
        """The same with stop strings."""
        params = [params_of(self.seed + number, self.stops[stop]) for number in range(CHOICES)]
        return self.llm.generate([self.prompt] * CHOICES, params, progress=False)

    def parts(self, token_ids: Sequence[int]) -> list[bytes]:
        """What the tokens stand for."""
        return [self.contents[token] for token in token_ids]


@dataclass
class Servers:
    """One for each unit of chunks, with the same model."""

    clients: dict[str, httpx.Client]
    offline: Offline

    def ask(self, asked: Combination) -> dict[str, Any]:
        """The answer, put together if it is streamed."""
        fields = {
            "n": asked.n,
            "stop": list(self.offline.stops[asked.stop]),
            "include_stop_str_in_output": asked.include,
            "echo": asked.echo,
            "logprobs": asked.logprobs,
        }
        if asked.stream:
            return joined(self.events(asked.unit, **fields, stream_options=USAGE_IN_STREAMS))
        answer: dict[str, Any] = self._post(asked.unit, **fields).json()
        return answer

    def events(self, unit: str, **fields: Any) -> list[Any]:
        """What a stream consists of. Fails where it is not UTF-8."""
        return events(self._post(unit, **fields, stream=True).content.decode())

    def _post(self, unit: str, **fields: Any) -> httpx.Response:
        body = {"prompt": self.offline.prompt, "seed": self.offline.seed, "max_tokens": MAX_TOKENS, **fields}
        response = self.clients[unit].post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response


def params_of(seed: int, stop: tuple[str, ...] = ()) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, seed=seed, stop=stop)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    directory = tmp_path_factory.mktemp("model") / "split-characters"
    contents = write_model(directory)
    llm = LLM(str(directory), random_seed=WEIGHTS_SEED, device="cpu", dtype="float32", max_rows=32)
    prompt = [contents.index(part) for part in PROMPT]
    return Offline(directory, llm, contents, prompt, *worth_asking_for(llm, contents, prompt))


@pytest.fixture
def servers(offline: Offline, tmp_path: Path) -> Iterator[Servers]:
    flags = ["--random-weights", str(WEIGHTS_SEED), "--dtype", "float32", "--max-rows", str(CHOICES * CONCURRENCY)]
    with ExitStack() as stack:
        clients = {}
        for unit in CHUNK_UNITS:
            server = start_server(tmp_path, "--model", str(offline.directory), "--stream-chunks", unit, *flags)
            url = stack.enter_context(server).url
            clients[unit] = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        yield Servers(clients, offline)


def worth_asking_for(
    llm: LLM, contents: list[bytes], prompt: list[int]
) -> tuple[int, list[Completion], dict[str, tuple[str, ...]]]:
    """A seed, its answers and stop strings: one answer goes on to its last token, another ends before, and each set of
    stop strings ends one of them.

    Tokens of random weights may differ between machines, so they are looked for.
    """
    tried = llm.generate([prompt] * SEEDS, [params_of(seed) for seed in range(SEEDS)], progress=False)
    for seed in range(SEEDS - CHOICES + 1):
        answers = tried[seed : seed + CHOICES]
        tokens = [[contents[token] for token in answer.token_ids] for answer in answers]
        first, *others = [split_pairs(one, len(prompt)) for one in tokens]
        ends = [answer.finish_reason for answer in answers]
        if ends[0] != "length" or "stop" not in ends or not first:
            continue
        stops: dict[str, tuple[str, ...]] = {
            "none": (),
            "a character": ("漢",),
            "two characters across blocks": (first[0],),
            "bytes that are none": ("\ufffd\ufffd",),
            "several": ("never said", *(pair for pairs in others for pair in pairs), first[-1]),
        }
        met = {
            name: {expected(one, stop, include=False).stop for one in tokens} - {None} for name, stop in stops.items()
        }
        # Where there are several, not always the same one ends the answer.
        if [len(strings) for strings in met.values()] == [0, 1, 1, 1, 2]:
            return seed, answers, stops
    raise AssertionError("no seed has such answers")


def test_offline_answers_are_what_their_tokens_read(offline: Offline) -> None:
    for name, stop in offline.stops.items():
        for number, (answer, free) in enumerate(zip(offline.answers(name), offline.free, strict=True)):
            known = expected(offline.parts(free.token_ids), stop, include=False)
            assert (answer.text, answer.stop_reason) == (known.text, known.stop), name
            assert answer.token_ids == free.token_ids[: known.tokens], name
            assert answer.finish_reason == ("stop" if known.stop else free.finish_reason), name
            pieces = offline.llm.stream(offline.prompt, params_of(offline.seed + number, stop))
            assert "".join(pieces) == known.text, name


def test_one_seed_one_text_in_every_combination(servers: Servers) -> None:
    offline = servers.offline
    check_chunks(servers)
    known = known_logprobs(servers)
    answers_to = {name: offline.answers(name) for name in offline.stops}
    ways = [("block", False), *((unit, True) for unit in CHUNK_UNITS)]
    combinations = [
        Combination(n, stop, include, echo, logprobs, unit, stream)
        for n, stop, include, echo, logprobs, (unit, stream) in itertools.product(
            (1, CHOICES), offline.stops, (False, True), (False, True), (None, 0, TOP), ways
        )
    ]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        for asked, body in zip(combinations, pool.map(servers.ask, combinations), strict=True):
            answers, prompt = answers_to[asked.stop][: asked.n], len(offline.prompt)
            echo = offline.llm.tokenizer.decode(offline.prompt) if asked.echo else ""
            expected_choices = [
                {
                    "index": index,
                    "text": echo + answer.text + (str(answer.stop_reason or "") if asked.include else ""),
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
                for index, answer in enumerate(answers)
            ]
            told = [choice.pop("logprobs") for choice in body["choices"]]
            assert body["choices"] == expected_choices, asked
            generated = sum(len(answer.token_ids) for answer in answers)
            assert body["usage"] == {
                "prompt_tokens": prompt,
                "completion_tokens": generated,
                "total_tokens": prompt + generated,
                "prompt_tokens_details": {"cached_tokens": 0},
            }, asked
            for arrays, all_arrays, answer in zip(told, known, answers, strict=False):
                check_logprobs(arrays, all_arrays, len(answer.token_ids), asked)


def check_chunks(servers: Servers) -> None:
    """A chunk is a block or a token, as each server was told."""
    first = BLOCK - len(PROMPT) % BLOCK
    blocks, rest = divmod(MAX_TOKENS - first, BLOCK)
    for unit, sizes in (("block", [first, *[BLOCK] * blocks, rest]), ("token", [1] * MAX_TOKENS)):
        *chunks, _ = servers.events(unit, logprobs=0)
        assert [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks] == sizes


def known_logprobs(servers: Servers) -> list[Arrays]:
    """Those of the prompt and the free answers, after checking tokens, offsets and what the offline API tells."""
    offline = servers.offline
    body = servers.ask(Combination(CHOICES, "none", False, True, TOP, "block", False))
    name, echoed = offline.llm.tokenizer.token_name, len(offline.llm.tokenizer.decode(offline.prompt))
    (scores,) = offline.llm.score([offline.prompt], progress=False)
    known: list[Arrays] = [choice["logprobs"] for choice in body["choices"]]
    for arrays, answer in zip(known, offline.free, strict=True):
        assert arrays["tokens"] == [name(token) for token in (*offline.prompt, *answer.token_ids)]
        assert arrays["text_offset"] == [
            *offsets(offline.parts(offline.prompt)),
            *(echoed + offset for offset in offsets(offline.parts(answer.token_ids))),
        ]
        assert close(arrays["token_logprobs"][1 : len(PROMPT)], scores)
    return known


def offsets(parts: list[bytes]) -> list[int]:
    """Characters that are complete in front of each token."""
    return [len(complete(b"".join(parts[:place]))) for place in range(len(parts))]


def check_logprobs(told: Arrays | None, known: Arrays, generated: int, asked: Combination) -> None:
    """They are the known ones of so many tokens behind the prompt's, which come with an echo."""
    if asked.logprobs is None:
        assert told is None, asked
        return
    assert told is not None, asked
    begin = 0 if asked.echo else len(PROMPT)
    part = {name: array[begin : len(PROMPT) + generated] for name, array in known.items()}
    ahead = part["text_offset"][0]
    assert told["tokens"] == part["tokens"], asked
    assert told["text_offset"] == [offset - ahead for offset in part["text_offset"]], asked
    assert close(told["token_logprobs"], part["token_logprobs"]), asked
    for name, likeliest, all_likeliest in zip(told["tokens"], told["top_logprobs"], part["top_logprobs"], strict=True):
        if all_likeliest is None:
            assert likeliest is None, asked
            continue
        names = [*all_likeliest] if asked.logprobs else [name]
        assert [*likeliest] == names, asked
        assert close([*likeliest.values()], [all_likeliest[one] for one in names]), asked


def close(ours: Sequence[float | None], known: Sequence[float | None]) -> bool:
    """Whether as many logprobs are equal but for rounding, and none is there where none is known."""
    return len(ours) == len(known) and all(
        one is None if other is None else one is not None and abs(one - other) < LOGPROB_TOLERANCE
        for one, other in zip(ours, known, strict=True)
    )
