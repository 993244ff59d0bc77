"""Choosing each row's next token from its logits.

Greedy rows take the best token. The others drop tokens under thresholds and take the best of logit / temperature +
Gumbel noise, which is a draw from the softmax over what is left (Gumbel-max). The noise depends on the request's seed
only (`kernels.philox`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jit import jit, power_of_2, tl
from kernels.philox import gumbel_noise, gumbel_tile

CPU_FIRST_LARGEST = 256
"""How many of the largest logits top-p looks at before it sorts the vocabulary, which takes ten times as long."""
MAX_TILE_V = 2048
"""Tokens that a program looks at together."""


@dataclass(frozen=True)
class SamplingTables:
    """How each row samples; every tensor is addressed by row."""

    temperature: Tensor
    """[rows] fp32; 0 is greedy."""
    top_k: Tensor
    """[rows] int32; 0 or less is off."""
    top_p: Tensor
    """[rows] fp32; 1 or more is off."""
    min_p: Tensor
    """[rows] fp32; 0 or less is off."""
    seed: Tensor
    """[rows] int64, not negative."""
    suppress_until: Tensor
    """[rows] int32: tokens with a smaller generated index are none of `suppressed_ids`."""
    suppressed_ids: Tensor
    """[rows, K] int32, padded with -1."""


def sample(logits: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables) -> tuple[Tensor, Tensor]:
    """Choose a token for every row.

    logits: [R, V], any float dtype. row_index: [R] int32 into the tables. generated_index: [R] int32, the token's
    place in its answer. Returns tokens [R] int32 (the lowest id among equals) and finite [R] bool: False where the
    logits hold NaN or +inf or leave no token to choose; the token is 0 there.
    """
    best, tokens = perturbed_scores(logits, row_index, generated_index, tables).max(dim=-1)
    finite = best.isfinite() & logits.amax(dim=-1).isfinite()
    return tokens.where(finite, 0).to(torch.int32), finite


def perturbed_scores(logits: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables) -> Tensor:
    """What `sample` takes the best of: scores [R, V] fp32, -inf for tokens that cannot be chosen. Same arguments."""
    scores = _suppress(logits.float(), row_index, generated_index, tables)
    temperature = tables.temperature.index_select(0, row_index)
    sampled = temperature > 0
    if logits.device.type != "cpu":
        # Which rows are greedy is not known without waiting for the device: all of them are perturbed.
        perturbed = _perturb(scores, temperature.where(sampled, 1.0), row_index, generated_index, tables)
        return perturbed.where(sampled[:, None], scores)
    if not bool(sampled.any()):
        return scores
    if bool(sampled.all()):
        return _perturb(scores, temperature, row_index, generated_index, tables)
    chosen = sampled.nonzero().squeeze(1)
    perturbed = _perturb(scores[chosen], temperature[chosen], row_index[chosen], generated_index[chosen], tables)
    return scores.index_copy(0, chosen, perturbed)


def _suppress(scores: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables) -> Tensor:
    """-inf for the suppressed ids of the rows that have not reached `suppress_until`."""
    active = generated_index < tables.suppress_until.index_select(0, row_index)
    if not tables.suppressed_ids.shape[1] or (scores.device.type == "cpu" and not bool(active.any())):
        return scores
    ids = tables.suppressed_ids.index_select(0, row_index)
    # Padding lowers token 0 to +inf at most, which is to say not at all.
    ceiling = torch.where((ids >= 0) & active[:, None], -torch.inf, torch.inf)
    return scores.scatter_reduce(1, ids.clamp(min=0).long(), ceiling, "amin")


def _perturb(
    scores: Tensor, temperature: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables
) -> Tensor:
    """Temperature, thresholds and noise for rows that sample; scores [R, V]."""
    scaled = scores / temperature[:, None]
    top_k, top_p, min_p = (table.index_select(0, row_index) for table in (tables.top_k, tables.top_p, tables.min_p))
    noisy = scaled + gumbel_noise(tables.seed.index_select(0, row_index), generated_index, scaled.shape[1])
    limited = (top_k > 0) | (top_p < 1) | (min_p > 0)
    if scores.device.type == "cpu":
        if not bool(limited.any()):
            return noisy
        if not bool(limited.all()):
            rows = limited.nonzero().squeeze(1)
            threshold = torch.full_like(temperature, -torch.inf)
            threshold[rows] = lowest_kept(scaled[rows], top_k[rows], top_p[rows], min_p[rows])
            return noisy.masked_fill(scaled < threshold[:, None], -torch.inf)
    return noisy.masked_fill(scaled < lowest_kept(scaled, top_k, top_p, min_p)[:, None], -torch.inf)


def lowest_kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit that top-k, top-p and min-p leave in each row; what equals it stays.

    With p the softmax over what the filters before have left:

        top-k: the k-th largest logit
        top-p: the largest t so that the p_i >= t sum up to top_p at least
        min-p: the logit with p = min_p * max p

    scaled: [R, V] fp32, logits divided by the temperature; top_k, top_p, min_p: [R]. Returns [R] fp32.
    """
    vocab_size = scaled.shape[1]
    best = scaled.amax(dim=-1, keepdim=True)
    descending = _largest(scaled, top_k)
    last = torch.where(top_k > 0, top_k.clamp(max=vocab_size), 0).long()[:, None] - 1
    kth = descending.gather(1, last.clamp(min=0))
    threshold = torch.where(last >= 0, kth, -torch.inf)
    # Double precision: a sum over the vocabulary must not depend on its order.
    total = _weights(scaled, best, threshold).sum(dim=-1, keepdim=True)
    wanted = top_p.double()[:, None] * total
    missing = _weights(descending, best, threshold).cumsum(dim=-1) < wanted
    if descending.shape[1] < vocab_size and bool((missing.all(dim=-1) & (top_p < 1)).any()):
        descending = scaled.sort(dim=-1, descending=True).values
        missing = _weights(descending, best, threshold).cumsum(dim=-1) < wanted
    enough = missing.sum(dim=-1, keepdim=True).clamp(max=descending.shape[1] - 1)
    threshold = torch.where(top_p[:, None] < 1, threshold.maximum(descending.gather(1, enough)), threshold)
    return torch.where(min_p[:, None] > 0, threshold.maximum(best + min_p[:, None].log()), threshold).squeeze(1)


def _largest(scaled: Tensor, top_k: Tensor) -> Tensor:
    """The largest logits of each row in order: all of them, or on the CPU first as many as are usually needed."""
    if scaled.device.type != "cpu":
        return scaled.sort(dim=-1, descending=True).values
    width = min(scaled.shape[1], max(CPU_FIRST_LARGEST, int(top_k.max())))
    return scaled.topk(width, dim=-1).values


def _weights(scaled: Tensor, best: Tensor, threshold: Tensor) -> Tensor:
    """Unnormalised probabilities of the logits at or above a threshold, in fp64."""
    return (scaled - best).double().exp().masked_fill(scaled < threshold, 0)


@jit
def _load_scores(
    line: tl.tensor, tokens: tl.tensor, vocab_size: tl.tensor, ids: tl.tensor, suppressed: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Logits of some tokens in fp32, as they are and with -inf for the first `suppressed` of `ids`."""
    raw = tl.load(line + tokens, mask=tokens < vocab_size, other=-float("inf")).to(tl.float32)
    score = raw
    for index in range(suppressed):
        score = tl.where(tokens == tl.load(ids + index), -float("inf"), score)
    return raw, score


@jit
def _mass_above(
    line: tl.tensor,
    vocab_size: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    limit: tl.tensor,
    best: tl.tensor,
    inverse: tl.tensor,
    WEIGHTED: tl.constexpr,
    TILE_V: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What the scores from `limit` on add up to, the lowest of them, and the highest one below it.

    Each counts 1, or exp((score - best) * inverse) if WEIGHTED.
    """
    sums = tl.zeros([TILE_V], tl.float32)
    above = tl.full([TILE_V], float("inf"), tl.float32)
    below = tl.full([TILE_V], -float("inf"), tl.float32)
    for start in range(0, vocab_size, TILE_V):
        _raw, score = _load_scores(line, start + tl.arange(0, TILE_V), vocab_size, ids, suppressed)
        reaches = score >= limit
        if WEIGHTED:
            sums += tl.where(reaches, tl.exp((score - best) * inverse), 0.0)
        else:
            sums += tl.where(reaches, 1.0, 0.0)
        above = tl.minimum(above, tl.where(reaches, score, float("inf")))
        below = tl.maximum(below, tl.where(reaches, -float("inf"), score))
    # The lanes' sums are short; their own sum must not depend on its order.
    return tl.sum(sums.to(tl.float64), 0), tl.min(above, 0), tl.max(below, 0)


@jit
def _largest_reaching(
    line: tl.tensor,
    vocab_size: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    lowest: tl.tensor,
    best: tl.tensor,
    inverse: tl.tensor,
    needed: tl.tensor,
    WEIGHTED: tl.constexpr,
    TILE_V: tl.constexpr,
) -> tl.tensor:
    """The largest score t so that what is at least t adds up to `needed`: by bisection from score to score.

    `lowest` reaches it, and is a score, as `best` is; both ends move to a score next to the middle, so that the search
    ends at the very score, also where the scores lie densely.
    """
    low, high = lowest, best
    while low < high:
        middle = low * 0.5 + high * 0.5
        middle = tl.where(middle > low, tl.minimum(middle, high), high)
        mass, above, below = _mass_above(line, vocab_size, ids, suppressed, middle, best, inverse, WEIGHTED, TILE_V)
        low, high = tl.where(mass >= needed, above, low), tl.where(mass >= needed, high, below)
    return low


@jit
def _lowest_kept(
    line: tl.tensor,
    vocab_size: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    lowest: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    TILE_V: tl.constexpr,
) -> tl.tensor:
    """`lowest_kept` of one row in Triton, as a threshold on its scores in front of the temperature."""
    inverse = 1.0 / temperature
    threshold = lowest
    if top_k > 0:
        threshold = _largest_reaching(
            line, vocab_size, ids, suppressed, threshold, best, inverse, top_k.to(tl.float64), False, TILE_V
        )
    if top_p < 1:
        mass, _above, _below = _mass_above(line, vocab_size, ids, suppressed, threshold, best, inverse, True, TILE_V)
        needed = top_p.to(tl.float64) * mass
        threshold = _largest_reaching(line, vocab_size, ids, suppressed, threshold, best, inverse, needed, True, TILE_V)
    if min_p > 0:
        threshold = tl.maximum(threshold, best + temperature * tl.log(min_p))
    return threshold


@jit
def _sample_row(
    logits: tl.tensor,
    row_index: tl.tensor,
    generated_index: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    suppress_until: tl.tensor,
    suppressed_ids: tl.tensor,
    tokens: tl.tensor,
    finite: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    suppressed_width: tl.tensor,
    TILE_V: tl.constexpr,
) -> None:
    """One row: the best of its scores, and if it samples, the best of what its thresholds leave and noise perturbs."""
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(row_index + entry).to(tl.int64)
    place = tl.load(generated_index + entry)
    temperature = tl.load(temperatures + row)
    line = logits + entry * stride
    ids = suppressed_ids + row * suppressed_width
    suppressed = tl.where(place < tl.load(suppress_until + row), suppressed_width, 0)
    lanes = tl.arange(0, TILE_V)
    best_of_lane = tl.full([TILE_V], -float("inf"), tl.float32)
    token_of_lane = tl.zeros([TILE_V], tl.int32)
    lowest = tl.full([TILE_V], float("inf"), tl.float32)
    wrong = tl.zeros([TILE_V], tl.int32)
    for start in range(0, vocab_size, TILE_V):
        raw, score = _load_scores(line, start + lanes, vocab_size, ids, suppressed)
        wrong = tl.where(raw < float("inf"), wrong, 1)  # NaN compares as false
        token_of_lane = tl.where(score > best_of_lane, start + lanes, token_of_lane)
        best_of_lane = tl.maximum(best_of_lane, score)
        lowest = tl.minimum(lowest, tl.where(score > -float("inf"), score, float("inf")))
    best = tl.max(best_of_lane, 0)
    token = tl.min(tl.where(best_of_lane == best, token_of_lane, vocab_size), 0)
    good = (tl.max(wrong, 0) == 0) & (best > -float("inf"))
    if good & (temperature > 0):
        threshold = _lowest_kept(
            line,
            vocab_size,
            ids,
            suppressed,
            tl.min(lowest, 0),
            best,
            temperature,
            tl.load(top_ks + row),
            tl.load(top_ps + row),
            tl.load(min_ps + row),
            TILE_V,
        )
        seed = tl.load(seeds + row)
        best_of_lane = tl.full([TILE_V], -float("inf"), tl.float32)
        for start in range(0, vocab_size, TILE_V):
            _raw, score = _load_scores(line, start + lanes, vocab_size, ids, suppressed)
            perturbed = tl.div_rn(score, temperature) + gumbel_tile(seed, place, start, TILE_V)
            perturbed = tl.where(score >= threshold, perturbed, -float("inf"))
            token_of_lane = tl.where(perturbed > best_of_lane, start + lanes, token_of_lane)
            best_of_lane = tl.maximum(best_of_lane, perturbed)
        best = tl.max(best_of_lane, 0)
        token = tl.min(tl.where(best_of_lane == best, token_of_lane, vocab_size), 0)
        good = tl.abs(best) < float("inf")
    tl.store(tokens + entry, tl.where(good, token, 0))
    tl.store(finite + entry, good)


def triton_sample(
    logits: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables
) -> tuple[Tensor, Tensor]:
    """`sample` in Triton: argmax over the kept ids of logit / temperature + Gumbel noise, one program a row.

    Greedy rows leave after one reading of their logits. The thresholds are found by bisection, without sorting.
    """
    assert logits.stride(1) == 1
    assert all(table.is_contiguous() for table in vars(tables).values())
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _sample_row[(rows,)](
        logits,
        row_index,
        generated_index,
        tables.temperature,
        tables.top_k,
        tables.top_p,
        tables.min_p,
        tables.seed,
        tables.suppress_until,
        tables.suppressed_ids,
        tokens,
        finite,
        logits.stride(0),
        vocab_size,
        tables.suppressed_ids.shape[1],
        TILE_V=max(16, min(power_of_2(vocab_size), MAX_TILE_V)),
        num_warps=8,
    )
    return tokens, finite
