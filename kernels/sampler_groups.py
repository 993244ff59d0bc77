"""The best score of each group of consecutive tokens: the only reading of all logits that most rows need.

For rows with top-p and without top-k it also adds up the weights of all tokens.
"""

from kernels.jit import jit, jit_for_any, tl


@jit
def load_scores(
    line: tl.tensor, tokens: tl.tensor, wanted: tl.tensor, ids: tl.tensor, suppressed: tl.tensor
) -> tl.tensor:
    """Logits of the `wanted` tokens in fp32, with -inf for the first `suppressed` of `ids` and for all other tokens."""
    return suppress(tl.load(line + tokens, mask=wanted, other=-float("inf")).to(tl.float32), tokens, ids, suppressed)


@jit
def suppress(raw: tl.tensor, tokens: tl.tensor, ids: tl.tensor, suppressed: tl.tensor) -> tl.tensor:
    """The logits of `tokens` with -inf for the first `suppressed` of `ids`."""
    score = raw
    for index in range(suppressed):
        score = tl.where(tokens == tl.load(ids + index), -float("inf"), score)
    return score


@jit
def count_suppressed(
    ids: tl.tensor, width: tl.tensor, place: tl.tensor, until: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """How many of a row's `width` ids `load_scores` has to look at: up to its last one, none from `until` on.

    A row may have many and seldom has more than one, and each costs a comparison with every token.
    """
    count = place * 0
    if place < until:
        lanes = tl.arange(0, WIDTH)
        present = tl.load(ids + lanes, mask=lanes < width, other=-1) >= 0
        count = tl.max(tl.where(present, lanes + 1, 0), 0)
    return count


@jit_for_any(addresses=("generated_index",))
def sample_groups(
    logits: tl.tensor,
    row_index: tl.tensor,
    generated_index: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    suppress_until: tl.tensor,
    suppressed_ids: tl.tensor,
    maxima: tl.tensor,
    masses: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    suppressed_width: tl.tensor,
    tiles: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_G: tl.constexpr,
) -> None:
    """TILE_G groups of one row: the best score of each, +inf where a logit is NaN or +inf, suppressed or not.

    maxima: [R, tiles * TILE_G] fp32; groups behind the vocabulary have -inf. masses: [R, tiles, 2] fp32, written for
    rows that need it: the tile's best score b, and the sum of exp((score - b) / temperature).
    """
    entry, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    groups = tile * TILE_G + tl.arange(0, TILE_G)
    tokens = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # Ahead of what is looked up about the row, one thing after the other, which takes as long as the logits do.
    raw = tl.load(logits + entry * stride + tokens, mask=tokens < vocab_size, other=-float("inf")).to(tl.float32)
    row = tl.load(row_index + entry).to(tl.int64)
    place, until = tl.load(generated_index + entry), tl.load(suppress_until + row)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    ids = suppressed_ids + row * suppressed_width
    score = suppress(raw, tokens, ids, count_suppressed(ids, suppressed_width, place, until, WIDTH))
    score = tl.where(raw < float("inf"), score, float("inf"))  # NaN compares as false
    maximum = tl.max(score, 1)
    tl.store(maxima + entry * tiles * TILE_G + groups, maximum)
    if (temperature > 0) & (top_k <= 0) & (top_p < 1):
        best = tl.maximum(tl.max(maximum, 0), -3e38)  # finite, so that -inf less it is -inf
        weight = tl.exp((score - best) * (1.0 / temperature))
        tl.store(masses + (entry * tiles + tile) * 2, best)
        tl.store(masses + (entry * tiles + tile) * 2 + 1, tl.sum(tl.sum(weight, 1), 0))
