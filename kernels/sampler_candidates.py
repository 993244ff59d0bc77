"""Sampling from the few tokens that can be kept: found by the groups' best scores, without the rest of the vocabulary.

With top-k, the k-th largest of the groups' best scores is a lower bound of the k-th largest score, since each of the k
groups holds a token that reaches it. So only groups that reach it hold tokens to keep; those of their tokens that
reach it are the candidates, and what the thresholds leave of the vocabulary is what they leave of the candidates.

Min-p is such a bound by itself. With top-p alone the best half of the groups is tried, whose tokens do where they hold
enough of the whole vocabulary's weight.
"""

from kernels.jit import jit, jit_for_any, tl
from kernels.philox import gumbel_at
from kernels.sampler_groups import count_suppressed, load_scores

UNDECIDED: tl.constexpr = tl.constexpr(-1)
"""Instead of a token."""


@jit
def largest_reaching(
    score: tl.tensor, weight: tl.tensor, needed: tl.tensor, lowest: tl.tensor, best: tl.tensor
) -> tl.tensor:
    """The largest score t so that the weights of the scores from t on add up to `needed`: by bisection.

    `lowest` reaches it, and is a score, as `best` is; both ends move to a score next to the middle, so that the search
    ends at the very score, also where the scores lie densely.
    """
    low, high = lowest, best
    while low < high:
        middle = low * 0.5 + high * 0.5
        middle = tl.where(middle > low, tl.minimum(middle, high), high)
        reaches = score >= middle
        enough = tl.sum(tl.where(reaches, weight, 0.0), 0) >= needed
        above = tl.min(tl.where(reaches, score, float("inf")), 0)
        below = tl.max(tl.where(reaches, -float("inf"), score), 0)
        low, high = tl.where(enough, above, low), tl.where(enough, high, below)
    return low


@jit
def _lower_bound(
    maximum: tl.tensor, best: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor
) -> tl.tensor:
    """What no candidate lies below, from the groups' best scores; -inf where they do not tell."""
    occupied = maximum > -float("inf")
    count = tl.sum(occupied.to(tl.int32), 0)
    bound = best * 0 - float("inf")
    rank = tl.where((top_k <= 0) & (top_p < 1), (count + 1) // 2, top_k)
    if (rank > 0) & (rank <= count):
        lowest = tl.min(tl.where(occupied, maximum, float("inf")), 0)
        bound = largest_reaching(maximum, occupied.to(tl.float32), rank.to(tl.float32), lowest, best)
    if (min_p > 0) & (top_p >= 1):
        bound = tl.maximum(bound, best + tl.log(min_p))
    return bound


@jit
def _total_weight(
    masses: tl.tensor, tiles: tl.tensor, best: tl.tensor, temperature: tl.tensor, TILES: tl.constexpr
) -> tl.tensor:
    """The sum of exp((score - best) / temperature) over the vocabulary, from those of its tiles."""
    tile = tl.arange(0, TILES)
    top = tl.load(masses + tile * 2, mask=tile < tiles, other=-float("inf"))
    mass = tl.load(masses + tile * 2 + 1, mask=tile < tiles, other=0)
    return tl.sum((mass * tl.exp((top - best) * (1.0 / temperature))).to(tl.float64), 0)


@jit
def _list_groups(maximum: tl.tensor, bound: tl.tensor, groups: tl.tensor, GROUPS: tl.constexpr) -> tl.tensor:
    """List the groups whose best score reaches the bound, ascending, in `groups` [GROUPS]; returns how many."""
    reaches = (maximum >= bound) & (maximum > -float("inf"))
    place = tl.cumsum(reaches.to(tl.int32), 0)
    tl.store(groups + place - 1, tl.arange(0, GROUPS), mask=reaches)
    tl.debug_barrier()  # other threads of the program read the list than wrote it
    return tl.max(place, 0)


@jit
def _list_candidates(
    line: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    vocab_size: tl.tensor,
    temperature: tl.tensor,
    bound: tl.tensor,
    groups: tl.tensor,
    chosen: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    GROUP: tl.constexpr,
    TILE_V: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> tl.tensor:
    """List the tokens of the first `chosen` of `groups` that reach the bound, ascending, in `scores` and `tokens`.

    Returns how many there are; if more than CAPACITY, only the first are listed and not all are counted.
    """
    count = chosen * 0
    start = chosen * 0
    while (start < chosen) & (count <= CAPACITY):
        lanes = start + tl.arange(0, TILE_V // GROUP)
        group = tl.load(groups + lanes, mask=lanes < chosen, other=0)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        wanted = (lanes < chosen)[:, None] & (token < vocab_size)
        score = load_scores(line, token, wanted, ids, suppressed)
        score = tl.reshape(tl.div_rn(score, temperature), TILE_V)
        candidate = (score >= bound) & (score > -float("inf"))
        place = count + tl.cumsum(candidate.to(tl.int32), 0)
        listed = candidate & (place <= CAPACITY)
        tl.store(scores + place - 1, score, mask=listed)
        tl.store(tokens + place - 1, tl.reshape(token, TILE_V), mask=listed)
        count = tl.max(place, 0)
        start += TILE_V // GROUP
    tl.debug_barrier()
    return count


@jit
def _lowest_kept(
    score: tl.tensor, best: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, total: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """`kernels.sampler.lowest_kept` of one row's candidates, and whether these tell; other places hold -inf.

    total: with top-p alone the weight of the whole vocabulary, fp64; otherwise not looked at.
    """
    present = score > -float("inf")
    threshold = tl.min(tl.where(present, score, float("inf")), 0)
    enough = best == best
    if (top_k > 0) & (top_k < tl.sum(present.to(tl.int32), 0)):
        threshold = largest_reaching(score, present.to(tl.float32), top_k.to(tl.float32), threshold, best)
    if top_p < 1:
        weight = tl.where(score >= threshold, tl.exp(score - best), 0.0).to(tl.float64)
        mass = tl.sum(weight, 0)
        needed = top_p.to(tl.float64) * tl.where(top_k > 0, mass, total)
        enough = mass >= needed
        if enough:
            threshold = largest_reaching(score, weight, needed, threshold, best)
    if min_p > 0:
        threshold = tl.maximum(threshold, best + tl.log(min_p))
    return threshold, enough


@jit
def _draw(
    scores: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    threshold: tl.tensor,
    seed: tl.tensor,
    place: tl.tensor,
    TILE_C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The best of the candidates from the threshold on, perturbed, and its token, the lowest among equals."""
    best_of_lane = tl.full([TILE_C], -float("inf"), tl.float32)
    token_of_lane = tl.full([TILE_C], 2147483647, tl.int32)
    for start in range(0, count, TILE_C):
        lanes = start + tl.arange(0, TILE_C)
        score = tl.load(scores + lanes, mask=lanes < count, other=-float("inf"))
        token = tl.load(tokens + lanes, mask=lanes < count, other=0)
        perturbed = tl.where(score >= threshold, score + gumbel_at(seed, place, token), -float("inf"))
        token_of_lane = tl.where(perturbed > best_of_lane, token, token_of_lane)
        best_of_lane = tl.maximum(best_of_lane, perturbed)
    best = tl.max(best_of_lane, 0)
    return best, tl.min(tl.where(best_of_lane == best, token_of_lane, 2147483647), 0)


@jit
def _first_of(
    line: tl.tensor,
    ids: tl.tensor,
    suppressed: tl.tensor,
    vocab_size: tl.tensor,
    best: tl.tensor,
    maximum: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """The lowest token with the best score, which is in the first group that has it."""
    group = tl.min(tl.where(maximum == best, tl.arange(0, GROUPS), GROUPS), 0)
    members = group * GROUP + tl.arange(0, GROUP)
    score = load_scores(line, members, members < vocab_size, ids, suppressed)
    return tl.min(tl.where(score == best, members, vocab_size), 0)


@jit_for_any(addresses=("generated_index",))
def sample_row(
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
    masses: tl.tensor,
    group_lists: tl.tensor,
    candidate_scores: tl.tensor,
    candidate_tokens: tl.tensor,
    tokens: tl.tensor,
    finite: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    suppressed_width: tl.tensor,
    maxima_width: tl.tensor,
    tiles: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_C: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    """One row: its token, or UNDECIDED if it samples and its candidates are unknown, too many or not enough."""
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(row_index + entry).to(tl.int64)
    place, temperature = tl.load(generated_index + entry), tl.load(temperatures + row)
    line, ids = logits + entry * stride, suppressed_ids + row * suppressed_width
    suppressed = count_suppressed(ids, suppressed_width, place, tl.load(suppress_until + row), WIDTH)
    groups = tl.arange(0, GROUPS)
    maximum = tl.load(maxima + entry * maxima_width + groups, mask=groups < maxima_width, other=-float("inf"))
    best = tl.max(maximum, 0)
    token = entry.to(tl.int32) * 0
    good = tl.abs(best) < float("inf")
    if good & (temperature > 0):
        token += UNDECIDED
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        total = best.to(tl.float64) * 0
        if (top_k <= 0) & (top_p < 1):
            total = _total_weight(masses + entry * tiles * 2, tiles, best, temperature, TILES)
        maximum, best = tl.div_rn(maximum, temperature), tl.div_rn(best, temperature)
        bound = _lower_bound(maximum, best, top_k, top_p, min_p)
        if (bound > -float("inf")) | (vocab_size <= CAPACITY):
            scores, candidates = candidate_scores + entry * CAPACITY, candidate_tokens + entry * CAPACITY
            list_ = group_lists + entry * maxima_width
            chosen = _list_groups(maximum, bound, list_, GROUPS)
            count = _list_candidates(
                line,
                ids,
                suppressed,
                vocab_size,
                temperature,
                bound,
                list_,
                chosen,
                scores,
                candidates,
                GROUP,
                TILE_V,
                CAPACITY,
            )
            if count <= CAPACITY:
                lanes = tl.arange(0, CAPACITY)
                score = tl.load(scores + lanes, mask=lanes < count, other=-float("inf"))
                threshold, enough = _lowest_kept(score, best, top_k, top_p, min_p, total)
                if enough:
                    best, token = _draw(scores, candidates, count, threshold, tl.load(seeds + row), place, TILE_C)
                    good = tl.abs(best) < float("inf")
    elif good:
        token = _first_of(line, ids, suppressed, vocab_size, best, maximum, GROUP, GROUPS)
    tl.store(tokens + entry, tl.where(good, token, 0))
    tl.store(finite + entry, good)
