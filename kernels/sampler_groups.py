"""The best score of each group of consecutive tokens: the only reading of all logits that most rows need."""

from kernels.jit import jit, tl


@jit
def load_scores(
    line: tl.tensor, tokens: tl.tensor, wanted: tl.tensor, ids: tl.tensor, suppressed: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Logits of the `wanted` tokens in fp32, as they are and with -inf for the first `suppressed` of `ids`.

    Other tokens have -inf.
    """
    raw = tl.load(line + tokens, mask=wanted, other=-float("inf")).to(tl.float32)
    score = raw
    for index in range(suppressed):
        score = tl.where(tokens == tl.load(ids + index), -float("inf"), score)
    return raw, score


@jit
def sample_groups(
    logits: tl.tensor,
    row_index: tl.tensor,
    generated_index: tl.tensor,
    suppress_until: tl.tensor,
    suppressed_ids: tl.tensor,
    maxima: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    suppressed_width: tl.tensor,
    tiles: tl.tensor,
    GROUP: tl.constexpr,
    TILE_G: tl.constexpr,
) -> None:
    """TILE_G groups of one row: the best score of each, +inf where a logit is NaN or +inf, suppressed or not.

    maxima: [R, tiles * TILE_G] fp32; groups behind the vocabulary have -inf.
    """
    entry, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tl.load(row_index + entry).to(tl.int64)
    suppressed = tl.where(
        tl.load(generated_index + entry) < tl.load(suppress_until + row), suppressed_width, suppressed_width * 0
    )
    groups = tile * TILE_G + tl.arange(0, TILE_G)
    tokens = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    raw, score = load_scores(
        logits + entry * stride, tokens, tokens < vocab_size, suppressed_ids + row * suppressed_width, suppressed
    )
    score = tl.where(raw < float("inf"), score, float("inf"))  # NaN compares as false
    tl.store(maxima + entry * tiles * TILE_G + groups, tl.max(score, 1))
