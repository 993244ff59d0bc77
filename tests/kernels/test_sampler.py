"""The sampler against a plain one in Python, rule by rule."""

import math

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.philox import gumbel_noise
from kernels.sampler import SamplingTables, perturbed_scores, sample
from tests.kernels.reference import int32, random

INF = math.inf


def tables(
    temperature: list[float],
    top_k: list[int] | None = None,
    top_p: list[float] | None = None,
    min_p: list[float] | None = None,
    seed: list[int] | None = None,
    suppress_until: list[int] | None = None,
    suppressed_ids: list[list[int]] | None = None,
) -> SamplingTables:
    rows = len(temperature)
    return SamplingTables(
        temperature=torch.tensor(temperature),
        top_k=int32(top_k or [0] * rows),
        top_p=torch.tensor(top_p or [1.0] * rows),
        min_p=torch.tensor(min_p or [0.0] * rows),
        seed=torch.tensor(seed or list(range(rows))),
        suppress_until=int32(suppress_until or [0] * rows),
        suppressed_ids=torch.tensor(suppressed_ids or [[-1, -1]] * rows, dtype=torch.int32),
    )


def kept_ids(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """What the filters leave, one after the other, by the words of the rules."""
    scaled = [value / temperature for value in logits.tolist()]
    best = max(scaled)
    kept = set(range(len(scaled)))
    if top_k > 0:
        limit = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        kept = {token for token in kept if scaled[token] >= limit}
    total = math.fsum(math.exp(scaled[token] - best) for token in kept)
    p = {token: math.exp(scaled[token] - best) / total for token in kept}
    if top_p < 1:
        limits = [t for t in set(p.values()) if math.fsum(q for q in p.values() if q >= t) >= top_p]
        kept = {token for token in kept if p[token] >= max(limits)}
    if min_p > 0:
        kept = {token for token in kept if p[token] >= min_p * max(p.values())}
    return kept


def one_row(kernels: Kernels, logits: list[float], settings: SamplingTables, place: int = 0) -> tuple[int, bool]:
    tokens, finite = kernels.sample(torch.tensor([logits]), int32([0]), int32([place]), settings)
    assert tokens.dtype == torch.int32
    return int(tokens[0]), bool(finite[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_best_and_the_lowest_of_equals(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-5.0, -7.0, -5.0, -INF]], dtype=dtype)
    tokens, finite = kernels.sample(logits, int32([1, 0]), int32([0, 9]), tables([0.0, 0.0]))
    assert tokens.tolist() == [1, 0]
    assert finite.tolist() == [True, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1.0, math.nan, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_a_row_that_is_not_finite_fails_alone(kernels: Kernels, temperature: float, bad: list[float]) -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0], bad, [0.0, 9.0, -INF]])
    tokens, finite = kernels.sample(
        logits, int32([0, 1, 2]), int32([0, 0, 0]), tables([temperature] * 3, top_k=[1, 2, 1])
    )
    assert finite.tolist() == [True, False, True]
    assert tokens.tolist() == [2, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_what_is_not_finite_is_found_at_a_suppressed_token_too(kernels: Kernels, bad: float) -> None:
    settings = tables([0.0], suppress_until=[1], suppressed_ids=[[1, -1]])
    assert one_row(kernels, [0.0, bad, 0.0], settings) == (0, False)


def test_suppression_ends_at_its_index_and_padding_suppresses_nothing(kernels: Kernels) -> None:
    settings = tables([0.0, 0.0], suppress_until=[3, 0], suppressed_ids=[[2, 0], [2, -1]])
    logits = torch.tensor([[5.0, 1.0, 9.0]])
    for place, expected in ((0, 1), (2, 1), (3, 2)):
        assert int(kernels.sample(logits, int32([0]), int32([place]), settings)[0]) == expected
    assert int(kernels.sample(logits, int32([1]), int32([0]), settings)[0]) == 2
    padded = tables([0.0], suppress_until=[9], suppressed_ids=[[-1, 2]])
    assert one_row(kernels, [5.0, 1.0, 9.0], padded) == (0, True)


def test_nothing_left_to_choose_is_not_finite(kernels: Kernels) -> None:
    settings = tables([0.0], suppress_until=[1], suppressed_ids=[[0, 1]])
    assert one_row(kernels, [5.0, 1.0], settings) == (0, False)
    assert one_row(kernels, [5.0, 1.0], settings, place=1) == (0, True)


def test_tables_without_suppressed_ids(kernels: Kernels) -> None:
    settings = tables([0.0], suppress_until=[5])
    empty = SamplingTables(**{**vars(settings), "suppressed_ids": torch.zeros(1, 0, dtype=torch.int32)})
    assert one_row(kernels, [5.0, 1.0], empty) == (0, True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (7, 1.0, 0.0),
        (1000, 1.0, 0.0),
        (-1, 0.9, 0.0),
        (0, 1e-9, 0.0),
        (0, 0.999999, 0.0),
        (0, 1.0, 0.05),
        (0, 1.0, 1.0),
        (20, 0.8, 0.01),
        (3, 0.5, 0.5),
    ],
)
def test_thresholds(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random(6, 50, scale=2).double().mul(4).round().div(4).float()  # coarse, so that there are ties
    settings = tables([temperature] * 6, [top_k] * 6, [top_p] * 6, [min_p] * 6)
    scores = perturbed_scores(logits, torch.arange(6).int(), int32([4] * 6), settings)
    noise = gumbel_noise(settings.seed, int32([4] * 6), 50)
    for row in range(6):
        kept = kept_ids(logits[row], temperature, top_k, top_p, min_p)
        assert {token for token in range(50) if scores[row, token] > -INF} == kept
        for token in kept:
            expected = float(logits[row, token]) / temperature + float(noise[row, token])
            assert float(scores[row, token]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_ties_at_a_threshold_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]])
    scores = perturbed_scores(logits, int32([0]), int32([0]), tables([1.0], top_k=[2]))
    assert (scores > -INF).tolist() == [[False, True, True, True, True]]
    even = torch.zeros(1, 4)
    scores = perturbed_scores(even, int32([0]), int32([0]), tables([1.0], top_p=[0.3], min_p=[1.0]))
    assert (scores > -INF).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.99), (400, 0.9), (300, 1.0), (0, 1 - 1e-7)])
def test_thresholds_far_down_a_flat_distribution(top_k: int, top_p: float) -> None:
    """More tokens are kept than the ones that are looked at first."""
    logits = random(3, 700, scale=0.1)
    logits[2, :300] += 9  # one row needs fewer
    settings = tables([1.0] * 3, [top_k] * 3, [top_p] * 3)
    scores = perturbed_scores(logits, int32([0, 1, 2]), int32([0] * 3), settings)
    for row in range(3):
        kept = {token for token in range(700) if scores[row, token] > -INF}
        expected = kept_ids(logits[row], 1.0, top_k, float(settings.top_p[row]), 0.0)
        assert len(kept) > 75
        assert kept == expected


def test_top_p_counts_what_top_k_left() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    settings = tables([1.0], top_k=[2], top_p=[0.55])
    scores = perturbed_scores(probabilities.log(), int32([0]), int32([0]), settings)
    assert (scores > -INF).tolist() == [[True, False, False, False]], "0.4 of 0.7 is above 0.55"


def test_mixed_batch_equals_its_rows_alone() -> None:
    """Rows of every kind together: what a row pays for, and what it gets, is its own business."""
    settings = tables(
        temperature=[0.0, 1.0, 0.7, 1.0, 1.3, 0.0],
        top_k=[0, 0, 5, 0, 0, 3],
        top_p=[1.0, 1.0, 1.0, 0.6, 1.0, 0.5],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.2, 0.3],
        seed=[0, 1, 2, 3, (1 << 63) - 1, 5],
        suppress_until=[2, 0, 2, 0, 0, 0],
        suppressed_ids=[[1, 2]] * 6,
    )
    logits, places = random(8, 77), int32([0, 1, 2, 3, 0, 1, 2, 1])
    rows = int32([3, 0, 2, 5, 4, 1, 0, 3])
    scores = perturbed_scores(logits, rows, places, settings)
    tokens, finite = sample(logits, rows, places, settings)
    assert finite.all()
    assert torch.equal(tokens.long(), scores.argmax(-1))
    for entry in range(8):
        part = slice(entry, entry + 1)
        assert torch.equal(perturbed_scores(logits[part], rows[part], places[part], settings), scores[part])


def test_draws_follow_the_softmax() -> None:
    draws = 20_000
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    settings = tables([1.0], seed=[1234])
    logits = probabilities.log().expand(draws, 4)
    tokens, _ = sample(logits, torch.zeros(draws, dtype=torch.int32), torch.arange(draws).int(), settings)
    frequencies = torch.bincount(tokens, minlength=4) / draws
    assert float((frequencies - probabilities).abs().max()) < 0.012


def test_the_same_seed_and_place_draw_the_same_token(kernels: Kernels) -> None:
    logits = random(1, 300).expand(4, 300)
    settings = tables([1.0] * 4, seed=[7, 7, 8, 9])
    places = int32([5, 5, 5, 5])
    first, _ = kernels.sample(logits, int32([0, 1, 2, 3]), places, settings)
    again, _ = kernels.sample(logits, int32([3, 2, 1, 0]), places, settings)
    assert first[0] == first[1]
    assert first.tolist() == again.flip(0).tolist()
    assert len(set(first.tolist())) > 1


def kinds_of_rows(rows: int) -> SamplingTables:
    """Every filter alone and together, hot and cold, greedy rows between them, some with suppressed tokens."""
    return tables(
        temperature=[(0.0, 1.0, 0.7, 1.3, 2.0, 0.05, 1.0)[row % 7] for row in range(rows)],
        top_k=[(0, 0, 5, 0, 40, 1)[row % 6] for row in range(rows)],
        top_p=[(1.0, 0.9, 0.3, 0.999, 1e-6)[row % 5] for row in range(rows)],
        min_p=[(0.0, 0.0, 0.1, 0.0)[row % 4] for row in range(rows)],
        seed=[(row * 0x9E3779B97F4A7C15) % (1 << 63) for row in range(rows)],
        suppress_until=[(0, 3)[row % 2] for row in range(rows)],
        suppressed_ids=[[row % 3, -1, 3] for row in range(rows)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab_size", "scale"), [(5, 1.0), (300, 3.0), (2049, 0.2), (4500, 2.0)])
def test_triton_chooses_as_the_twin(triton_kernels: Kernels, dtype: torch.dtype, vocab_size: int, scale: float) -> None:
    rows = 420 if torch.cuda.is_available() else 35
    settings = kinds_of_rows(rows)
    logits = random(rows, vocab_size, scale=scale, dtype=dtype, seed=vocab_size)
    row_index = torch.randperm(rows, generator=torch.Generator().manual_seed(3)).int()
    places = torch.arange(rows).int() % 6
    tokens, finite = triton_kernels.sample(logits, row_index, places, settings)
    assert finite.all()
    scores = perturbed_scores(logits, row_index, places, settings)
    best = scores.amax(-1)
    chosen = scores.gather(1, tokens.long()[:, None]).squeeze(1)
    assert (best - chosen <= 1e-5 * (1 + best.abs())).all(), "nothing but rounding may tell two scores apart"
    assert int((tokens != scores.argmax(-1)).sum()) <= rows // 100


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_triton_thresholds_of_logits_of_any_size(triton_kernels: Kernels, scale: float) -> None:
    logits = random(1, 100).mul(scale)
    settings = tables([1.0], top_k=[3])
    best_three = logits[0].topk(3).indices.tolist()
    drawn = set()
    for place in range(12):
        tokens, finite = triton_kernels.sample(logits, int32([0]), int32([place]), settings)
        assert finite[0]
        drawn.add(int(tokens[0]))
    assert drawn <= set(best_three)
    assert (len(drawn) > 1) == (scale < 1)
