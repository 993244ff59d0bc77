"""The sampler against a plain one in Python, rule by rule."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.philox import gumbel_noise
from kernels.sampler import SamplingTables, perturbed_scores, sample, triton_sample
from kernels.sampler_vocabulary import GREATEST_NOISE
from tests.kernels.reference import DTYPES, int32, random

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


def test_greedy_takes_the_lowest_of_equals_far_apart(kernels: Kernels) -> None:
    logits = random(2, 4500)
    logits[0, [4499, 1203, 1202, 4000]] = 9.0
    tokens, _ = kernels.sample(logits, int32([0, 1]), int32([0, 0]), tables([0.0, 0.0]))
    assert tokens.tolist() == [1202, int(logits[1].argmax())]


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


def assert_chosen_as_by_the_twin(
    triton_kernels: Kernels, logits: Tensor, settings: SamplingTables, row_index: Tensor | None = None
) -> None:
    rows = len(logits)
    row_index = torch.arange(rows).int() if row_index is None else row_index
    places = torch.arange(rows).int() % 6
    tokens, finite = triton_kernels.sample(logits, row_index, places, settings)
    assert finite.all()
    scores = perturbed_scores(logits, row_index, places, settings)
    best = scores.amax(-1)
    chosen = scores.gather(1, tokens.long()[:, None]).squeeze(1)
    assert (best - chosen <= 1e-5 * (1 + best.abs())).all(), "nothing but rounding may tell two scores apart"
    assert int((tokens != scores.argmax(-1)).sum()) <= rows // 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "scale"), [(5, 1.0), (300, 3.0), (2049, 0.2), (4500, 2.0)])
def test_triton_chooses_as_the_twin(triton_kernels: Kernels, dtype: torch.dtype, vocab_size: int, scale: float) -> None:
    rows = 420 if torch.cuda.is_available() else 35
    logits = random(rows, vocab_size, scale=scale, dtype=dtype, seed=vocab_size)
    row_index = torch.randperm(rows, generator=torch.Generator().manual_seed(3)).int()
    assert_chosen_as_by_the_twin(triton_kernels, logits, kinds_of_rows(rows), row_index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_top_k_of_any_size(triton_kernels: Kernels, dtype: torch.dtype) -> None:
    """Of 282 groups: fewer, as many and more; more candidates than are listed; more than the vocabulary."""
    top_k = [1, 2, 50, 281, 282, 283, 1000, 1024, 1025, 4500, 9999]
    rows = 2 * len(top_k)
    settings = tables(
        temperature=[(1.0, 0.6, 3.0)[row % 3] for row in range(rows)],
        top_k=top_k * 2,
        top_p=[(1.0, 1e-9, 0.5, 0.9, 1 - 1e-6)[row % 5] for row in range(rows)],
        min_p=[(0.0, 0.01)[row // 2 % 2] for row in range(rows)],
    )
    assert_chosen_as_by_the_twin(triton_kernels, random(rows, 4500, dtype=dtype), settings)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (8, 0.45, 0.0), (8, 1.0, 0.9), (8, 0.8, 0.92), (5000, 1.0, 0.9)]
)
def test_triton_draws_all_that_is_kept_and_nothing_else(
    triton_kernels: Kernels, top_k: int, top_p: float, min_p: float
) -> None:
    """Many draws of few tokens that are all likely, most of them in one group, behind which come many unlikely ones."""
    rows, temperature = 60, 20.0
    logits = random(1, 4500, scale=0.1)
    logits[0, 1600:1612] = 7 - torch.arange(12) / 4
    settings = tables([temperature] * rows, [top_k] * rows, [top_p] * rows, [min_p] * rows)
    tokens, finite = triton_kernels.sample(
        logits.expand(rows, -1), torch.arange(rows).int(), int32([0] * rows), settings
    )
    assert finite.all()
    kept = kept_ids(logits[0], temperature, top_k, top_p, min_p)
    assert 1 < len(kept) < 10
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("equals", [2, 40, 1000, 1100, 4000])
def test_triton_draws_from_all_that_equal_the_last_of_top_k(triton_kernels: Kernels, equals: int) -> None:
    """Also where there are more of them than candidates are listed."""
    rows = 24
    logits = random(rows, 4500, scale=0.01, dtype=torch.bfloat16)
    where = torch.randperm(4500, generator=torch.Generator().manual_seed(equals))[:equals]
    logits[:, where] = 1.0
    logits[:, 17] = 1.5
    assert_chosen_as_by_the_twin(triton_kernels, logits, tables([1.0] * rows, top_k=[2] * rows))


def test_triton_keeps_what_the_temperature_makes_equal(triton_kernels: Kernels) -> None:
    rows, temperature, top_k = 40, 0.9, 3
    logits = torch.full((1, 3000), -5.0)
    logits[0, 100:1700:100] = 1.9 + torch.arange(16) * 2**-23
    scaled = logits[0] / temperature
    kept = set((scaled >= scaled.topk(top_k).values[-1]).nonzero().squeeze(1).tolist())
    assert top_k < len(kept) < 16
    settings = tables([temperature] * rows, top_k=[top_k] * rows)
    tokens, finite = triton_kernels.sample(
        logits.expand(rows, -1), torch.arange(rows).int(), int32([0] * rows), settings
    )
    assert finite.all()
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_triton_suppresses_in_the_best_groups(triton_kernels: Kernels, temperature: float) -> None:
    """The k-th best group is another one then, and groups without any token to choose are none."""
    rows, best = 12, [4499, 3000, 17]
    logits = random(rows, 4500)
    for height, token in enumerate(best):
        logits[:, token] = 9.0 - height
    settings = tables(
        [temperature] * rows, top_k=[1, 2, 3] * 4, suppress_until=[0, 9] * 6, suppressed_ids=[best[:2]] * rows
    )
    assert_chosen_as_by_the_twin(triton_kernels, logits, settings)
    tokens, _ = triton_kernels.sample(logits[:1], int32([1]), int32([0]), settings)
    assert int(tokens[0]) not in best[:2]


def test_triton_top_k_of_more_than_the_groups_with_a_token(triton_kernels: Kernels) -> None:
    """All tokens that can be chosen are in three groups, so that there is no k-th best group."""
    rows = 24
    logits = torch.full((rows, 4500), -INF)
    logits[:, 160:200] = random(rows, 40, scale=0.1)
    assert_chosen_as_by_the_twin(triton_kernels, logits, tables([1.0] * rows, top_k=[20] * rows))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("top_k", [0, 5])
def test_triton_finds_what_is_not_finite_anywhere(
    triton_kernels: Kernels, temperature: float, bad: float, top_k: int
) -> None:
    logits = random(4, 4500)
    logits[1, 4499] = bad
    logits[2, 2000] = bad
    settings = tables([temperature] * 4, top_k=[top_k] * 4, suppress_until=[9] * 4, suppressed_ids=[[-1, 2000]] * 4)
    tokens, finite = triton_kernels.sample(logits, int32([0, 1, 2, 3]), int32([0] * 4), settings)
    assert finite.tolist() == [True, False, False, True]
    assert tokens[1:3].tolist() == [0, 0]


class NotLaunched:
    """In place of a kernel."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *_arguments, **_sizes: None


def test_few_candidates_do_without_the_whole_vocabulary(
    triton_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.sampler.sample_vocabulary", NotLaunched())
    settings = tables(
        temperature=[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 1.0, 1.0, 0.2],
        top_k=[0, 1, 50, 200, 300, 0, 0, 0, 0, 0],
        top_p=[0.9, 1.0, 0.9, 1.0, 1.0, 1.0, 0.9, 0.9, 1.0, 0.9],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1],
    )
    few = [True, True, True, True, False, False, True, False, True, True]
    rows = len(few)
    logits = random(rows, 4500, dtype=torch.bfloat16)
    tokens, finite = triton_kernels.sample(logits, torch.arange(rows).int(), int32([0] * rows), settings)
    assert finite.all()
    assert [token >= 0 for token in tokens.tolist()] == few


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


def test_triton_draws_from_a_tile_that_only_its_noise_makes_win(triton_kernels: Kernels) -> None:
    """The last tile is far below the first, and its token has the greatest noise of many places."""
    assert -math.log(-math.log(1 - 2**-24)) < GREATEST_NOISE.value
    token, seed, many = 4400, 11, 500
    noise = gumbel_noise(torch.full((many,), seed), torch.arange(many).int(), token + 4)[:, token]
    place = int(noise.argmax())
    greatest = float(noise[place])
    assert greatest > 5
    first = float(gumbel_noise(torch.tensor([seed]), int32([place]), 1)[0, 0])
    for behind, expected in ((0.01, token), (-0.01, 0)):
        logits = torch.full((1, 4500), -1000.0)
        logits[0, 0] = 0.0
        logits[0, token] = first - greatest + behind
        settings = tables([1.0], seed=[seed])
        assert one_row(triton_kernels, logits[0].tolist(), settings, place=place) == (expected, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_the_places_of_a_block_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **of_kernel: compiled.append(of_kernel["repr"])
    )
    settings = SamplingTables(**{name: table.cuda() for name, table in vars(tables([1.0])).items()})
    places = torch.arange(8, dtype=torch.int32, device="cuda")
    logits, row_index = torch.randn(1, 777, device="cuda"), places[:1]
    triton_sample(logits, row_index, places[:1], settings)
    assert compiled
    compiled.clear()
    for place in range(1, 4):
        triton_sample(logits, row_index, places[place : place + 1], settings)
    assert not compiled
