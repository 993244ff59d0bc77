"""Requests with a common prompt prefix: it is computed once, and nobody's answer shows it."""

import random
from collections.abc import Sequence

import pytest

from engine.core import EngineCore
from engine.types import Delta, GenerationRequest, SamplingParams
from tests.engine.helpers import DEVICES, GoldenModel, is_tie

MODELS = [
    GoldenModel("lookup_prefix2"),
    GoldenModel("lookup_projection", "forced_tail"),
    GoldenModel("vanilla_gptneox"),
]
PAGE_SIZE = 8
REQUESTS = 40


def requests_sharing(prefix_tokens: int, number: int = REQUESTS) -> list[GenerationRequest]:
    """Prompts of one length, each with an end of its own."""
    rng = random.Random(1)
    prefix = [rng.randrange(1, 500) for _ in range(prefix_tokens)]
    return [
        GenerationRequest.of(
            request_id=request_id,
            prompt_token_ids=(*prefix, *(rng.randrange(1, 500) for _ in range(11))),
            params=SamplingParams(max_tokens=rng.randint(1, 9), temperature=request_id % 2, seed=request_id),
        )
        for request_id in range(number)
    ]


class Course:
    """A core run until all is answered: answers, cached tokens of each, and the positions that were prefilled."""

    def __init__(self, core: EngineCore, requests: Sequence[GenerationRequest]) -> None:
        self.answers: dict[int, list[int]] = {request.request_id: [] for request in requests}
        self.cached: dict[int, int] = dict.fromkeys(self.answers, 0)
        self.prefilled = 0
        seen = None
        core.add([(request.request_id, request) for request in requests])
        while core.has_work:
            report = core.step()
            if core.step_underway is not None and core.step_underway is not seen:
                seen = core.step_underway
                self.prefilled += sum(chunk.length for chunk in seen.prefill)
            for _, delta in report.deltas if report else ():
                self._take(delta)
            core.check_integrity()
        self.hits, self.queries = core.totals.prefix_cache_hits, core.totals.prefix_cache_queries

    def _take(self, delta: Delta) -> None:
        self.answers[delta.request_id] += delta.token_ids
        self.cached[delta.request_id] += delta.cached_tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.variant)
def test_a_shared_prefix_is_prefilled_once(model: GoldenModel, overlapped: bool, device: str) -> None:
    """Together or one after another, cached or not: the answers are the naive model's."""
    length = model.config.block_length
    page_tokens = PAGE_SIZE * length
    shared = 2 * page_tokens
    requests = requests_sharing(shared)

    def course(*, prefix_cache: bool) -> Course:
        core = model.core(
            device=device, overlapped=overlapped, prefix_cache=prefix_cache, max_rows=6, max_step_positions=20,
            page_size=PAGE_SIZE,
        )  # fmt: skip
        return Course(core, requests)

    cached, plain = course(prefix_cache=True), course(prefix_cache=False)
    padding = -(shared + 11) % length if model.alignment == "left_pad" else 0
    # Padding is in the first page, and so one token of the prefix less is in the last one that all share.
    found = shared - padding
    assert cached.queries == REQUESTS * (shared + 11)
    assert cached.hits == sum(cached.cached.values()) == (REQUESTS - 1) * found
    assert sorted(cached.cached.values()) == [0] + [found] * (REQUESTS - 1)
    assert plain.prefilled - cached.prefilled == (REQUESTS - 1) * 2 * PAGE_SIZE
    assert (plain.hits, plain.queries, set(plain.cached.values())) == (0, 0, {0})
    ties = 0
    for request in requests:
        expected = model.oracle(request)
        ties += sum(is_tie(expected, run.answers[request.request_id]) for run in (cached, plain))
    assert ties <= 1


def test_salts_share_nothing() -> None:
    model = MODELS[0]
    first, second = requests_sharing(2 * PAGE_SIZE * model.config.block_length, number=2)
    salted = [
        GenerationRequest(request_id=r.request_id, prompt=r.prompt, params=r.params, cache_salt=salt)
        for r, salt in ((first, "a"), (second, "b"))
    ]
    assert Course(model.core(page_size=PAGE_SIZE), salted).hits == 0
