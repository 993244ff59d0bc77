"""Sampling with the whole vocabulary: for rows whose thresholds leave, or have to add up, too much of it.

The thresholds are found by bisection, without sorting; each of its passes reads all logits of the row.
"""

from kernels.jit import jit, jit_for_any, tl
from kernels.philox import gumbel_tile
from kernels.sampler_candidates import UNDECIDED
from kernels.sampler_groups import count_suppressed, load_scores

GREATEST_NOISE: tl.constexpr = tl.constexpr(16.64)
"""Above -log(-log(1 - 2^-24)), the noise of the greatest uniform number that there is."""


@jit
def _load_tile(
    line: tl.tensor,
    start: tl.tensor,
    vocab_size: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    TILE_V: tl.constexpr,
) -> tl.tensor:
    """The scores of the tokens from `start` on."""
    tokens = start + tl.arange(0, TILE_V)
    return load_scores(line, tokens, tokens < vocab_size, ids, suppressed)


@jit
def _range_of_scores(
    line: tl.tensor, vocab_size: tl.tensor, ids: tl.tensor, suppressed: tl.tensor, TILE_V: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The lowest score above -inf, and the best one."""
    lowest = tl.full([TILE_V], float("inf"), tl.float32)
    best = tl.full([TILE_V], -float("inf"), tl.float32)
    for start in range(0, vocab_size, TILE_V):
        score = _load_tile(line, start, vocab_size, ids, suppressed, TILE_V)
        lowest = tl.minimum(lowest, tl.where(score > -float("inf"), score, float("inf")))
        best = tl.maximum(best, score)
    return tl.min(lowest, 0), tl.max(best, 0)


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
        score = _load_tile(line, start, vocab_size, ids, suppressed, TILE_V)
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
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    TILE_V: tl.constexpr,
) -> tl.tensor:
    """`lowest_kept` of one row in Triton, as a threshold on its scores in front of the temperature."""
    inverse = 1.0 / temperature
    threshold, best = _range_of_scores(line, vocab_size, ids, suppressed, TILE_V)
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
def _perturbed_tile(
    line: tl.tensor,
    start: tl.tensor,
    vocab_size: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    threshold: tl.tensor,
    temperature: tl.tensor,
    seed: tl.tensor,
    place: tl.tensor,
    TILE_V: tl.constexpr,
) -> tl.tensor:
    """The perturbed scores of the tokens from `start` on, -inf below the threshold."""
    score = _load_tile(line, start, vocab_size, ids, suppressed, TILE_V)
    perturbed = tl.div_rn(score, temperature) + gumbel_tile(seed, place, start, TILE_V)
    return tl.where(score >= threshold, perturbed, -float("inf"))


@jit
def _draw(
    line: tl.tensor,
    vocab_size: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    maxima: tl.tensor,
    maxima_width: tl.tensor,
    threshold: tl.tensor,
    temperature: tl.tensor,
    seed: tl.tensor,
    place: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_V: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The best of the scores from the threshold on, perturbed, and its token, the lowest among equals.

    A tile whose best score lies below the threshold, or could not win with the greatest noise against the tile that
    holds the best score of all, is not even read.
    """
    groups = tl.arange(0, GROUPS)
    maximum = tl.load(maxima + groups, mask=groups < maxima_width, other=-float("inf"))
    likely = tl.min(tl.where(maximum == tl.max(maximum, 0), groups, GROUPS), 0) * GROUP // TILE_V * TILE_V
    bar = tl.max(
        _perturbed_tile(line, likely, vocab_size, ids, suppressed, threshold, temperature, seed, place, TILE_V), 0
    )
    best_of_lane = tl.full([TILE_V], -float("inf"), tl.float32)
    token_of_lane = tl.zeros([TILE_V], tl.int32)
    lanes = tl.arange(0, TILE_V // GROUP)
    for start in range(0, vocab_size, TILE_V):
        group = start // GROUP + lanes
        top = tl.max(tl.load(maxima + group, mask=group < maxima_width, other=-float("inf")), 0)
        if (top >= threshold) & (tl.div_rn(top, temperature) + GREATEST_NOISE >= bar):
            perturbed = _perturbed_tile(
                line, start, vocab_size, ids, suppressed, threshold, temperature, seed, place, TILE_V
            )
            token_of_lane = tl.where(perturbed > best_of_lane, start + tl.arange(0, TILE_V), token_of_lane)
            best_of_lane = tl.maximum(best_of_lane, perturbed)
    best = tl.max(best_of_lane, 0)
    return best, tl.min(tl.where(best_of_lane == best, token_of_lane, vocab_size), 0)


@jit_for_any(addresses=("generated_index",))
def sample_vocabulary(
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
    maxima: tl.tensor,
    tokens: tl.tensor,
    finite: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    suppressed_width: tl.tensor,
    maxima_width: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_V: tl.constexpr,
) -> None:
    """The token of one row that is undecided so far: the best of what its thresholds leave and noise perturbs."""
    entry = tl.program_id(0).to(tl.int64)
    if tl.load(tokens + entry) == UNDECIDED:
        row = tl.load(row_index + entry).to(tl.int64)
        place = tl.load(generated_index + entry)
        temperature = tl.load(temperatures + row)
        line, ids = logits + entry * stride, suppressed_ids + row * suppressed_width
        suppressed = count_suppressed(ids, suppressed_width, place, tl.load(suppress_until + row), WIDTH)
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        threshold = temperature * 0 - float("inf")
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            threshold = _lowest_kept(line, vocab_size, ids, suppressed, temperature, top_k, top_p, min_p, TILE_V)
        best, token = _draw(
            line,
            vocab_size,
            ids,
            suppressed,
            maxima + entry * maxima_width,
            maxima_width,
            threshold,
            temperature,
            tl.load(seeds + row),
            place,
            GROUP,
            GROUPS,
            TILE_V,
        )
        good = tl.abs(best) < float("inf")
        tl.store(tokens + entry, tl.where(good, token, 0))
        tl.store(finite + entry, good)
