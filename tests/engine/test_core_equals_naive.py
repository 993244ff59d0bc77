"""The engine against the naive model: any mix of arrivals, lengths, chunks and aborts gives the oracle's tokens."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest

from engine.config import ModelConfig
from engine.core import EngineCore
from engine.model.naive import NaiveAnswer
from engine.sequence import SequenceState
from engine.types import SEED_RANGE, Delta, GenerationRequest, SamplingParams
from tests.engine.helpers import DEVICES, GoldenModel, is_tie

MODELS = [
    GoldenModel("lookup_prefix2", "left_pad"),
    GoldenModel("lookup_prefix2", "forced_tail"),
    GoldenModel("lookup_prefix1", "left_pad"),
    GoldenModel("lookup_projection", "forced_tail"),
    GoldenModel("lookup_summation", "left_pad"),
    GoldenModel("vanilla_gptneox"),
]
CANDIDATES = 6
LOGPROB_TOLERANCE = 2e-4
STATES = (SequenceState.WAITING, SequenceState.PREFILLING, SequenceState.DECODING)


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and the step before which it is aborted, if ever."""

    request: GenerationRequest
    step: int
    abort_step: int | None


@dataclass
class Tally:
    """What the examples covered; a count of zero fails the test."""

    tokens: int = 0
    ties: int = 0
    seeded: int = 0
    aborts: Counter[SequenceState] = field(default_factory=Counter)
    aborts_in_flight: int = 0
    eos_offsets: Counter[int] = field(default_factory=Counter)
    adjusted: int = 0
    logprobs: int = 0
    finishes: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    cached_tokens: int = 0


def random_params(rng: random.Random, shortest: int, longest: int) -> SamplingParams:
    """Greedy and seeded sampling with every threshold, endings of every kind."""
    max_tokens = rng.randint(shortest, longest)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=int(max_tokens * rng.choice([0, 0, 0, 0.5, 1])),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 1, 5, 50]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        seed=rng.randrange(SEED_RANGE),
        ignore_eos=rng.random() < 0.2,
        stop_token_ids=rng.choice([(), (), (), tuple(range(40, 60)), (131, 355)]),
    )
    return adjusted_at_random(params)


def adjusted_at_random(params: SamplingParams) -> SamplingParams:
    """The same with bias, penalties and logprobs, or without, as its seed has it."""
    rng = random.Random(params.seed)
    bias = tuple((token, rng.uniform(-3, 3)) for token in rng.sample(range(512), 100))
    return msgspec.structs.replace(
        params,
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.6, -1.0]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.3, -0.4]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.2, 0.8]),
        logit_bias=rng.choice([(), (), (), bias]),
        logprobs=rng.choice([None, None, None, 0, 1, 20]),
    )


def without_endings(params: SamplingParams) -> SamplingParams:
    """The same, but that only max_tokens ends the answer."""
    return msgspec.structs.replace(params, ignore_eos=True, stop_token_ids=())


def random_arrivals(rng: random.Random, config: ModelConfig, *, crowd: bool) -> list[Arrival]:
    """A handful of requests. Prompts are random ids, some with the end-of-text id inside; the first is not aborted.

    Most prompts begin as others do, so that pages are shared.

    In a crowd, answers are so long beside their prompts that pages run out, whatever the tokens are: rounding differs
    between machines, and so do the tokens of random weights.
    """
    arrivals = []
    text = [rng.randrange(512) for _ in range(88)]
    for request_id in range(rng.randint(4 if crowd else 1, 7)):
        step = rng.randint(0, 6)
        abort_after = rng.choice([None, None, 0, 1, 2, 6]) if request_id else None
        share = config.max_length // 32
        params = random_params(rng, 12 * share, 22 * share) if crowd else random_params(rng, 1, 38)
        # Of one length often: where prompts are padded in front, others have no pages in common.
        length = rng.randint(1, 20) if crowd else rng.choice([rng.randint(1, 88), 88])
        shared = rng.choice([0, length // 2, length, length])
        request = GenerationRequest.of(
            request_id=request_id,
            prompt_token_ids=(*text[:shared], *(rng.randrange(512) for _ in range(length - shared))),
            params=without_endings(params) if crowd else params,
            priority=rng.choice([0, 0, 1]),
        )
        arrivals.append(Arrival(request, step, None if abort_after is None else step + abort_after))
    return arrivals


def run_core(core: EngineCore, arrivals: list[Arrival], tally: Tally) -> dict[int, list[Delta]]:
    """Drive the core step by step, checking its integrity after each; deltas by request id."""
    deltas: dict[int, list[Delta]] = {arrival.request.request_id: [] for arrival in arrivals}
    step = 0
    last_step = max(max(arrival.step, arrival.abort_step or 0) for arrival in arrivals)
    while core.has_work or step <= last_step:
        for arrival in arrivals:
            if arrival.step == step:
                core.add([(arrival.request.request_id, arrival.request)])
        for arrival in arrivals:
            if arrival.abort_step == step:
                state = core.state_of(arrival.request.request_id)
                assert core.abort(arrival.request.request_id) == (state is not None)
                if state is not None:
                    tally.aborts[state] += 1
                    tally.aborts_in_flight += core.step_in_flight and state is not SequenceState.WAITING
        core.check_integrity()
        report = core.step()
        core.check_integrity()
        for _, delta in report.deltas if report else ():
            deltas[delta.request_id].append(delta)
        step += 1
        assert step < 2000, "the engine does not come to an end"
    return deltas


def check_answer(
    arrival: Arrival, deltas: list[Delta], expected: NaiveAnswer, model: GoldenModel, tally: Tally
) -> None:
    """Compare one request's deltas with the oracle's answer: equal, or a prefix where it was aborted."""
    tokens = [token for delta in deltas for token in delta.token_ids]
    finished = bool(deltas) and deltas[-1].finish_reason is not None
    assert finished or arrival.abort_step is not None
    tally.tokens += len(tokens)
    tally.adjusted += len(tokens) if arrival.request.params.adjusts else 0
    tally.logprobs += check_logprobs(arrival.request.params.logprobs, deltas, expected)
    tally.seeded += len(tokens) if arrival.request.params.temperature else 0
    if not finished:
        if tokens != expected.token_ids[: len(tokens)]:
            tally.ties += is_tie(expected, tokens)
        return
    if is_tie(expected, tokens):
        tally.ties += 1
        return
    assert deltas[-1].finish_reason == expected.finish_reason
    assert deltas[-1].stop_reason == expected.stop_reason
    tally.finishes[expected.finish_reason] += 1
    if expected.finish_reason == "stop" and expected.stop_reason is None:
        tally.eos_offsets[end_offset(model, arrival.request, len(tokens))] += 1


def check_logprobs(top: int | None, deltas: list[Delta], expected: NaiveAnswer) -> int:
    """Compare the logprobs of the tokens that are the oracle's with it; returns how many there are."""
    told = [
        (token, one) for delta in deltas for token, one in zip(delta.token_ids, delta.logprobs, strict=top is not None)
    ]
    if top is None:
        assert not any(delta.logprobs for delta in deltas)
        return 0
    for place, (token, one) in enumerate(told):
        exact = expected.logprobs[place]
        assert abs(one.logprob - exact[token]) < LOGPROB_TOLERANCE
        assert len(one.top_ids) == len(one.top_logprobs) == top
        best = sorted(exact, reverse=True)[:top]
        assert all(abs(a - b) < LOGPROB_TOLERANCE for a, b in zip(one.top_logprobs, best, strict=True))
        assert all(abs(exact[a] - b) < LOGPROB_TOLERANCE for a, b in zip(one.top_ids, one.top_logprobs, strict=True))
        if token != expected.token_ids[place]:
            return place
    return len(told)


def with_ending(model: GoldenModel, arrivals: list[Arrival], offset: int) -> GoldenModel:
    """The model with an end-of-text id that ends the first answer at `offset` of a block, where one is found quickly.

    With the id 0 as it is, an end would hardly ever come. Summation embeds the id, so a candidate has to be tried.
    """
    request = arrivals[0].request
    unended = msgspec.structs.replace(request, params=without_endings(request.params))
    answer = model.oracle(unended).token_ids
    first_places = {token: answer.index(token) for token in answer}
    candidates = [token for token, at in first_places.items() if end_offset(model, request, at + 1) == offset]
    served = replace(model, eos_token_id=answer[-1])
    for candidate in candidates[-CANDIDATES:]:
        served = replace(model, eos_token_id=candidate)
        ended = served.oracle(unended).token_ids
        if candidate in ended and end_offset(served, request, ended.index(candidate) + 1) == offset:
            break
    return served


def end_offset(model: GoldenModel, request: GenerationRequest, tokens: int) -> int:
    """Where in its block an answer of so many tokens ends."""
    length = model.config.block_length
    forced = len(request.prompt_token_ids) % length if model.alignment == "forced_tail" else 0
    return (forced + tokens - 1) % length


def check_coverage(tally: Tally, block_length: int, *, overlapped: bool) -> None:
    """All that can happen has happened, and hardly any token was a near tie."""
    assert tally.ties * 1000 <= tally.tokens, f"{tally.ties} near ties in {tally.tokens} tokens"
    assert tally.seeded > 0
    assert tally.adjusted > 0
    assert tally.logprobs > 0
    assert all(tally.aborts[state] > 0 for state in STATES), tally.aborts
    assert all(tally.eos_offsets[offset] > 0 for offset in range(block_length)), tally.eos_offsets
    assert (tally.aborts_in_flight > 0) == overlapped
    assert tally.preemptions > 0
    assert tally.cached_tokens > 0
    assert tally.finishes["stop"] > 0
    assert tally.finishes["length"] > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.variant}-{model.alignment}")
def test_engine_equals_naive(model: GoldenModel, device: str) -> None:
    """Greedy and seeded tokens equal the oracle's over random mixes, with few rows, few pages and small chunks.

    Both loops take the same mixes: the oracle, which computes every token from the beginning, answers once.
    """
    tallies = {overlapped: Tally() for overlapped in (False, True)}
    config = model.config
    page_bytes = 2 * config.block_decoder.num_layers * config.block_decoder.hidden_size * 8 * 4
    pages_per_request = -(-config.max_positions // 8)
    # Fewer for a vanilla model, whose answers have one place to end at only.
    for seed in range(40 if config.block_length > 1 else 12):
        rng = random.Random(seed)
        crowd = seed % 3 == 0
        arrivals = random_arrivals(rng, config, crowd=crowd)
        served = with_ending(model, arrivals, seed % config.block_length)
        answers = {arrival.request.request_id: served.oracle(arrival.request) for arrival in arrivals}
        max_rows = rng.randint(3 if crowd else 1, 4)
        options: dict[str, Any] = {
            "device": device,
            "max_rows": max_rows,
            "max_step_positions": max_rows + rng.randint(1, 8),
            "page_size": 8,
            "kv_bytes": (pages_per_request + rng.randint(0, 1 if crowd else 3) + 1) * page_bytes,
        }
        for overlapped, tally in tallies.items():
            core = served.core(overlapped=overlapped, **options)
            deltas = run_core(core, arrivals, tally)
            tally.preemptions += core.preemptions
            tally.cached_tokens += core.totals.prefix_cache_hits
            assert core.load_now.running == core.load_now.waiting == core.load_now.pages_used == 0, f"seed {seed}"
            for arrival in arrivals:
                request_id = arrival.request.request_id
                check_answer(arrival, deltas[request_id], answers[request_id], served, tally)
    for overlapped, tally in tallies.items():
        check_coverage(tally, config.block_length, overlapped=overlapped)
