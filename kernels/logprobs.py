"""Log-probabilities of chosen tokens and of the likeliest ones, by the model's own logits.

logprob_i = (logit_i - max) - log(sum over j of exp(logit_j - max))
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.jit import jit, power_of_2, tl

MAX_TOP = 20
"""Most of the likeliest tokens that are told."""
TILE_V = 4096
WARPS = 8


class Logprobs(NamedTuple):
    """Of tokens [...]: their logprobs [...] fp32, the likeliest ids [..., MAX_TOP] int32, and theirs [..., MAX_TOP].

    What is equally likely comes in order of ids. Behind as many as a row wants stand -1 and -inf.
    """

    chosen: Tensor
    ids: Tensor
    values: Tensor


def top_logprobs(logits: Tensor, tokens: Tensor, wanted: Tensor) -> Logprobs:
    """For each row the logprob of its token, and of the likeliest tokens.

    logits: [R, V], any float dtype. tokens: [R] int32. wanted: [R] int32, how many of the likeliest, at most MAX_TOP;
    rows that want -1 get no logprob either, but 0. NaN where the logits hold NaN or +inf, or nothing but -inf; the ids
    mean nothing then.
    """
    scores = logits.float()
    rows, vocab_size = scores.shape
    best = scores.amax(1, keepdim=True)
    logprobs = (scores - best) - (scores - best).exp().sum(1, keepdim=True).log()
    chosen = logprobs.gather(1, tokens.long()[:, None]).squeeze(1).where(wanted >= 0, 0)
    width = min(MAX_TOP, vocab_size)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    ids = order.new_full((rows, MAX_TOP), -1, dtype=torch.int32)
    values = scores.new_full((rows, MAX_TOP), -torch.inf)
    told = torch.arange(width, device=scores.device) < wanted[:, None]
    ids[:, :width] = order.int().where(told, -1)
    values[:, :width] = logprobs.gather(1, order).where(told, -torch.inf)
    return Logprobs(chosen, ids, values)


@jit
def _top_logprobs(
    logits: tl.tensor,
    tokens: tl.tensor,
    wanted: tl.tensor,
    chosen: tl.tensor,
    ids: tl.tensor,
    values: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    MAX_TOP: tl.constexpr,
    TOP: tl.constexpr,
    TILE_V: tl.constexpr,
) -> None:
    """One row. Every one of the likeliest is found by a pass over the logits, as the best behind the one before it."""
    entry = tl.program_id(0).to(tl.int64)
    want = tl.load(wanted + entry)
    line = logits + entry * stride
    lanes = tl.arange(0, TOP)
    tl.store(ids + entry * MAX_TOP + lanes, tl.full([TOP], -1, tl.int32), mask=lanes < MAX_TOP)
    tl.store(values + entry * MAX_TOP + lanes, tl.full([TOP], -float("inf"), tl.float32), mask=lanes < MAX_TOP)
    tl.debug_barrier()  # the first of them are written again below, by another thread
    logprob = want * 0.0
    if want >= 0:
        tops = tl.full([TILE_V], -float("inf"), tl.float32)
        spoilt = tl.zeros([TILE_V], tl.int32)
        for start in range(0, vocab_size, TILE_V):
            token = start + tl.arange(0, TILE_V)
            score = tl.load(line + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
            tops = tl.maximum(tops, score)
            spoilt += (score != score).to(tl.int32)
        best = tl.max(tops, 0)
        sound = (tl.max(spoilt, 0) == 0) & (best < float("inf")) & (best > -float("inf"))
        best = tl.where(sound, best, float("nan"))
        sums = tl.zeros([TILE_V], tl.float32)
        for start in range(0, vocab_size, TILE_V):
            token = start + tl.arange(0, TILE_V)
            score = tl.load(line + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
            sums += tl.exp(score - best)
        total = tl.log(tl.sum(sums, 0))
        logprob = tl.load(line + tl.load(tokens + entry)).to(tl.float32) - best - total
        last, last_id = best, want * 0 - 1
        for rank in range(tl.minimum(want, vocab_size)):
            found = tl.full([TILE_V], -float("inf"), tl.float32)
            found_ids = tl.zeros([TILE_V], tl.int32) + vocab_size
            for start in range(0, vocab_size, TILE_V):
                token = start + tl.arange(0, TILE_V)
                score = tl.load(line + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
                behind = (token < vocab_size) & ((score < last) | ((score == last) & (token > last_id)))
                better = behind & ((score > found) | (found_ids == vocab_size))
                found = tl.where(better, score, found)
                found_ids = tl.where(better, token, found_ids)
            last = tl.max(found, 0)
            last_id = tl.min(tl.where(found == last, found_ids, vocab_size), 0)
            tl.store(ids + entry * MAX_TOP + rank, last_id)
            tl.store(values + entry * MAX_TOP + rank, last - best - total)
    tl.store(chosen + entry, logprob)


def triton_top_logprobs(logits: Tensor, tokens: Tensor, wanted: Tensor) -> Logprobs:
    """`top_logprobs` in Triton, a program a row."""
    assert logits.stride(1) == 1
    rows, vocab_size = logits.shape
    chosen = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, MAX_TOP, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows, MAX_TOP, dtype=torch.float32, device=logits.device)
    _top_logprobs[(rows,)](
        logits,
        tokens,
        wanted,
        chosen,
        ids,
        values,
        logits.stride(0),
        vocab_size,
        MAX_TOP=MAX_TOP,
        TOP=power_of_2(MAX_TOP),
        TILE_V=min(power_of_2(vocab_size), TILE_V),
        num_warps=WARPS,
    )
    return Logprobs(chosen, ids, values)
