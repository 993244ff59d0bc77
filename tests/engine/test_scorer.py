"""Scoring against the naive model's teacher forcing: any lengths, chunks and company give the same logprobs."""

import random

import pytest
import torch

from engine.core import EngineCore
from engine.model.naive import naive_model
from engine.scheduler import OUT_OF_MEMORY_ERROR, QueueFullError
from engine.score_layout import lay_out_text, longest_text
from engine.scorer import Scorer
from engine.types import Delta, GenerationRequest, InvalidRequestError, SamplingParams, ScoreRequest, pack_tokens
from tests.engine.helpers import DEVICES, GoldenModel, golden_tensors

MODELS = [
    GoldenModel("lookup_prefix2", "left_pad"),
    GoldenModel("lookup_projection", "forced_tail"),
    GoldenModel("lookup_summation", "left_pad"),
    GoldenModel("vanilla_gptneox"),
]
TOLERANCE = 2e-4


def exact_logprobs(model: GoldenModel, tokens: list[int]) -> list[list[float]]:
    """Of every token but the first, those of the whole vocabulary; laid out by the words of the rule."""
    config = model.config
    length = config.block_length
    if length == 1:
        front: list[int] = []
    elif model.alignment == "left_pad":
        front = [config.pad_token_id] * (length - 1)
    else:
        front = [config.eos_token_id] * length
    filled = [*front, *tokens]
    filled += [7] * (-len(filled) % length)
    ids = torch.tensor(filled).view(1, -1, length)
    if ids.shape[1] == 1:
        return []
    logprobs = naive_model(config, golden_tensors(model.variant)).forward(ids).logits.log_softmax(-1)
    flat: list[list[float]] = logprobs.flatten(0, 2).tolist()
    return flat[len(front) + 1 - length :][: len(tokens) - 1]


def score(request_id: int, tokens: list[int], top: int = 0) -> ScoreRequest:
    return ScoreRequest(request_id=request_id, text=pack_tokens(tokens), top=top)


def run(core: EngineCore) -> tuple[dict[object, Delta], dict[int, list[int]]]:
    """What was scored, by key, and what was generated."""
    scored: dict[object, Delta] = {}
    generated: dict[int, list[int]] = {}
    while core.has_work:
        report = core.step()
        if report is None:
            continue
        assert not scored.keys() & dict(report.scored).keys()
        scored |= dict(report.scored)
        for _, delta in report.deltas:
            generated.setdefault(delta.request_id, []).extend(delta.token_ids)
    return scored, generated


def check(model: GoldenModel, tokens: list[int], top: int, delta: Delta) -> None:
    assert (delta.finish_reason, delta.token_ids) == ("length", ())
    exact = exact_logprobs(model, tokens)
    assert len(delta.logprobs) == len(tokens) - 1 == len(exact)
    for token, line, one in zip(tokens[1:], exact, delta.logprobs, strict=True):
        assert abs(one.logprob - line[token]) < TOLERANCE
        best = sorted(line, reverse=True)[:top]
        assert len(one.top_logprobs) == top
        assert all(abs(a - b) < TOLERANCE for a, b in zip(one.top_logprobs, best, strict=True))
        assert all(abs(line[a] - b) < TOLERANCE for a, b in zip(one.top_ids, one.top_logprobs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlapped", [False, True], ids=["synchronous", "overlapped"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.variant}-{model.alignment}")
def test_texts_beside_generation(model: GoldenModel, overlapped: bool, device: str) -> None:
    rng = random.Random(0)
    core = model.core(device=device, max_rows=3, max_step_positions=13, page_size=8, overlapped=overlapped)
    longest = longest_text(model.config)
    texts = [[rng.randrange(512) for _ in range(length)] for length in (1, 2, 3, 5, 30, 9, longest, 1, 41, longest - 1)]
    tops = [rng.choice([0, 1, 20]) for _ in texts]
    requests = [
        GenerationRequest.of(
            request_id=100 + index,
            prompt_token_ids=range(7, 20 + index),
            params=SamplingParams(max_tokens=11, seed=index, ignore_eos=True),
        )
        for index in range(5)
    ]
    scores = [(index, score(index, text, top)) for index, (text, top) in enumerate(zip(texts, tops, strict=True))]
    core.add([(one.request_id, one) for one in requests], scores)
    assert core.load_now.waiting == len(requests) + len(texts)
    scored, generated = run(core)
    assert core.load_now.waiting == core.load_now.running == core.load_now.pages_used == 0
    for index, (text, top) in enumerate(zip(texts, tops, strict=True)):
        check(model, text, top, scored[index])
    for one in requests:
        assert generated[one.request_id] == model.oracle(one).token_ids


def test_generation_goes_on_while_a_long_text_is_scored() -> None:
    model = MODELS[0]
    core = model.core(max_rows=1, max_step_positions=2)
    request = GenerationRequest.of(
        request_id=9, prompt_token_ids=range(4), params=SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
    )
    core.add([(9, request)], [(0, score(0, list(range(100))))])
    reports = [core.step() for _ in range(3)]
    assert sum(report.deltas.tokens for report in reports if report) == 8
    assert not any(report.scored for report in reports if report)
    check(model, list(range(100)), 0, run(core)[0][0])


def test_an_aborted_text_is_not_told_of() -> None:
    model = MODELS[0]
    core = model.core(max_step_positions=80)
    core.add([], [(index, score(index, list(range(60)))) for index in range(6)])
    assert core.abort(5)
    core.step()
    assert core.abort(2)
    assert not core.abort(5) and not core.abort(17)
    assert run(core)[0].keys() <= {0, 1, 3, 4}
    assert not core.has_work


def test_what_cannot_be_scored_is_refused_with_its_group() -> None:
    model = MODELS[0]
    core = model.core(max_waiting=2)
    too_long = list(range(longest_text(model.config) + 1))
    for request in (score(0, []), score(0, [512]), score(0, [-1]), score(0, [1, 2], 21), score(0, too_long)):
        with pytest.raises(InvalidRequestError):
            core.add([], [(1, score(1, [1, 2])), (0, request)])
    with pytest.raises(QueueFullError):
        core.add([], [(index, score(index, [1, 2])) for index in range(3)])
    assert not core.has_work


def test_a_layout_has_no_position_too_many() -> None:
    for model in (*MODELS, GoldenModel("lookup_prefix2", "forced_tail")):
        config = model.config
        for length in range(1, longest_text(config) + 1):
            layout = lay_out_text(torch.arange(1, length + 1).int().numpy(), config)
            predicted = layout.blocks[1:].ravel()[layout.first :][: length - 1]
            assert predicted.tolist() == list(range(2, length + 1))
            assert layout.positions <= config.max_positions


def test_a_text_that_memory_does_not_suffice_for_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    core = MODELS[0].core()
    original = Scorer._run

    def no_memory(scorer: Scorer, pieces: object) -> object:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Scorer, "_run", no_memory)
    core.add([], [(0, score(0, [1, 2, 3]))])
    assert run(core)[0][0].error == OUT_OF_MEMORY_ERROR
    monkeypatch.setattr(Scorer, "_run", original)
    core.add([], [(1, score(1, [1, 2, 3]))])
    check(MODELS[0], [1, 2, 3], 0, run(core)[0][1])


def test_logits_that_are_not_finite_fail_a_text() -> None:
    tensors = dict(golden_tensors("lookup_prefix2"))
    table = tensors["embedder.embeddings.weight"].clone()
    table[500] = torch.nan
    core = MODELS[0].core(tensors=tensors | {"embedder.embeddings.weight": table})
    core.add([], [(0, score(0, [500, *range(9)])), (1, score(1, list(range(9))))])
    scored = run(core)[0]
    assert scored[0].finish_reason == "error"
    check(MODELS[0], list(range(9)), 0, scored[1])
