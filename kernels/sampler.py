"""Choosing each row's next token from its logits.

Greedy rows take the best token. The others drop tokens under thresholds and take the best of logit / temperature +
Gumbel noise, which is a draw from the softmax over what is left (Gumbel-max). The noise depends on the request's seed
only (`kernels.philox`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jit import cdiv, power_of_2
from kernels.philox import gumbel_noise
from kernels.sampler_candidates import sample_row
from kernels.sampler_groups import sample_groups
from kernels.sampler_vocabulary import sample_vocabulary

CPU_FIRST_LARGEST = 256
"""How many of the largest logits top-p looks at before it sorts the vocabulary, which takes ten times as long."""
MIN_GROUP = 16
"""Fewest tokens of a group."""
MAX_GROUPS = 1024
"""Most groups of a row, by which larger vocabularies have larger groups."""
CAPACITY = 1024
"""Most candidates of a row that are not a matter of the whole vocabulary."""
GROUPS_TILE_V = 4096
CANDIDATES_TILE_V = 1024
DRAW_TILE = 128
VOCABULARY_TILE_V = 2048
"""Tokens that a program looks at together: to find the groups' best scores, to find candidates, to draw from them, and
to sample with the whole vocabulary."""
GROUPS_WARPS = 4
CANDIDATES_WARPS = 4
VOCABULARY_WARPS = 8


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


def triton_sample(
    logits: Tensor, row_index: Tensor, generated_index: Tensor, tables: SamplingTables
) -> tuple[Tensor, Tensor]:
    """`sample` in Triton, in three kernels; each row's work depends on its own logits and settings only.

    The first reads all logits, many programs a row, for the best score of each group of tokens. The second has a
    program a row: it finishes greedy rows from the best group, and rows that sample from few candidates. The third
    finishes the others, again a program a row.
    """
    assert logits.stride(1) == 1
    assert all(table.is_contiguous() for table in vars(tables).values())
    rows, vocab_size = logits.shape
    device = logits.device
    group, tile_groups, tiles = _groups(vocab_size)
    width = tiles * tile_groups
    maxima = torch.empty(rows, width, dtype=torch.float32, device=device)
    masses = torch.empty(rows, tiles, 2, dtype=torch.float32, device=device)
    group_lists = torch.empty(rows, width, dtype=torch.int32, device=device)
    candidate_scores = torch.empty(rows, CAPACITY, dtype=torch.float32, device=device)
    candidate_tokens = torch.empty(rows, CAPACITY, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    suppression = tables.suppress_until, tables.suppressed_ids
    settings = tables.temperature, tables.top_k, tables.top_p, tables.min_p, tables.seed, *suppression
    suppressed_width = tables.suppressed_ids.shape[1]
    rows_of = logits, row_index, generated_index
    sizes = logits.stride(0), vocab_size, suppressed_width
    shapes = {"WIDTH": power_of_2(suppressed_width), "GROUP": group}
    sample_groups[(rows * tiles,)](
        *rows_of,
        tables.temperature,
        tables.top_k,
        tables.top_p,
        *suppression,
        maxima,
        masses,
        *sizes,
        tiles,
        **shapes,
        TILE_G=tile_groups,
        num_warps=GROUPS_WARPS,
    )
    sample_row[(rows,)](
        *rows_of,
        *settings,
        maxima,
        masses,
        group_lists,
        candidate_scores,
        candidate_tokens,
        tokens,
        finite,
        *sizes,
        width,
        tiles,
        **shapes,
        GROUPS=power_of_2(width),
        TILES=power_of_2(tiles),
        TILE_V=max(group, CANDIDATES_TILE_V),
        TILE_C=DRAW_TILE,
        CAPACITY=CAPACITY,
        num_warps=CANDIDATES_WARPS,
    )
    sample_vocabulary[(rows,)](
        *rows_of,
        *settings,
        maxima,
        tokens,
        finite,
        *sizes,
        width,
        **shapes,
        GROUPS=power_of_2(width),
        TILE_V=max(group, min(power_of_2(vocab_size), VOCABULARY_TILE_V)),
        num_warps=VOCABULARY_WARPS,
    )
    return tokens, finite


def _groups(vocab_size: int) -> tuple[int, int, int]:
    """Tokens of a group, groups of a tile, and tiles of a row."""
    group = max(MIN_GROUP, power_of_2(vocab_size) // MAX_GROUPS)
    groups = cdiv(vocab_size, group)
    tile_groups = min(power_of_2(groups), max(1, GROUPS_TILE_V // group))
    return group, tile_groups, cdiv(groups, tile_groups)
