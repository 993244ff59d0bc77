"""Traffic as users make it: log-normal lengths, Poisson arrivals, answers that end by EOS, mixed sampling.

A model with random weights hardly ever says EOS. Here its weights are changed so that EOS has by far the largest logit
always, and each request has `min_tokens`, before which the sampler may not choose it. So an answer ends just where its
drawn length wants it, whichever way its tokens are chosen, by the path that a trained model's EOS takes: sampled on the
device, known to the scheduler at the commit only, with a step in flight that still writes the row. `max_tokens` leaves
room for the longest answer, as clients' does, and admission has to reckon with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness import SAMPLING, next_request_id
from benchmarks.models import Workload
from engine.page_pool import PagePool
from engine.types import GenerationRequest

SIGMA = 0.5
"""Of the logarithm of lengths: one in twenty is more than twice the mean."""
LONGEST = 3
"""Times the mean, at which lengths are cut: under one in a hundred is longer."""
DRAWN = 4096
"""Answers, at least, of which those that are under way are a choice."""
EOS_SCALE = 8.0
"""Squared, EOS's logit; far above those of random weights, whose standard deviation is about 1."""


class Arrival(NamedTuple):
    """A request and when it comes, in seconds from the start."""

    seconds: float
    request: GenerationRequest


def log_normal(mean: int, number: int, generator: np.random.Generator) -> list[int]:
    """Log-normal lengths from 1 to LONGEST times `mean`, which they have on average as far as whole numbers allow."""
    if not number:
        return []
    drawn = generator.lognormal(sigma=SIGMA, size=number)
    # What is cut from the longest goes to the others.
    for _ in range(16):
        drawn = np.clip(drawn * (mean / drawn.mean()), 1, LONGEST * mean)
    lengths: list[int] = np.rint(drawn).astype(int).tolist()
    return lengths


def poisson(rate: float, number: int, generator: np.random.Generator) -> list[float]:
    """Moments of arrival, in seconds, at `rate` a second on average; over all of them, exactly."""
    moments = np.cumsum(generator.exponential(size=number))
    scaled: list[float] = (moments * (number / rate / moments[-1])).tolist()
    return scaled


def mixed_requests(
    workload: Workload, number: int, vocab_size: int, generator: np.random.Generator
) -> list[GenerationRequest]:
    """Requests of random lengths that end by EOS; a third greedy, a third at temperature 1, a third top-k and top-p."""
    prompts = log_normal(workload.prompt_tokens, number, generator)
    answers = log_normal(workload.answer_tokens, number, generator)
    return _ending_by_eos(workload, prompts, answers, [0] * number, vocab_size, generator)


def underway_requests(
    workload: Workload, number: int, vocab_size: int, generator: np.random.Generator
) -> list[GenerationRequest]:
    """What of `mixed_requests` one finds open at a random moment, with what is written so far as part of the prompt.

    A request is found in proportion to the length of its answer, and anywhere in it. So the open requests' answers are
    longer than others, but what remains of one has, in the steady state, always the same distribution.
    """
    prompts = log_normal(workload.prompt_tokens, number, generator)
    lengths = np.array(log_normal(workload.answer_tokens, max(number, DRAWN), generator))
    answers = generator.choice(lengths, number, p=lengths / lengths.sum())
    written = generator.integers(0, answers).tolist()
    return _ending_by_eos(workload, prompts, answers.tolist(), written, vocab_size, generator)


def _ending_by_eos(
    workload: Workload,
    prompts: list[int],
    answers: list[int],
    written: list[int],
    vocab_size: int,
    generator: np.random.Generator,
) -> list[GenerationRequest]:
    """Requests of these lengths in tokens, of whose answers `written` are in the prompts already."""
    most = LONGEST * workload.answer_tokens
    return [
        GenerationRequest.of(
            request_id=next_request_id(),
            prompt_token_ids=tuple(generator.integers(1, vocab_size, prompt + done).tolist()),
            params=replace(sampling, max_tokens=most - done, min_tokens=answer - done - 1, seed=place),
        )
        for place, (prompt, answer, done, sampling) in enumerate(
            zip(prompts, answers, written, cycle(SAMPLING.values()), strict=False)
        )
    ]


@dataclass(frozen=True)
class Traffic:
    """Mixed requests of a workload that arrive at random and bring `offered` tokens of answers a second."""

    workload: Workload
    vocab_size: int
    offered: float
    generator: np.random.Generator

    def fresh(self, number: int) -> list[GenerationRequest]:
        """New requests."""
        return mixed_requests(self.workload, number, self.vocab_size, self.generator)

    def underway(self, number: int) -> list[GenerationRequest]:
        """New ones that are under way."""
        return underway_requests(self.workload, number, self.vocab_size, self.generator)

    def arrivals(self, number: int) -> list[Arrival]:
        """New requests that arrive one after the other, at the exact rate over all of them."""
        requests = self.fresh(number)
        rate = self.offered * number / wanted_tokens(requests)
        return list(map(Arrival, poisson(rate, number, self.generator), requests))


def fixed_requests(
    workload: Workload, number: int, vocab_size: int, generator: np.random.Generator
) -> list[GenerationRequest]:
    """Greedy requests of one length for the same changed model: EOS is kept from them to their end."""
    length = workload.answer_tokens
    params = replace(SAMPLING["greedy"], max_tokens=length, min_tokens=length, seed=0)
    prompts = generator.integers(1, vocab_size, (number, workload.prompt_tokens))
    return [
        GenerationRequest.of(request_id=next_request_id(), prompt_token_ids=tuple(prompt.tolist()), params=params)
        for prompt in prompts
    ]


def wanted_tokens(requests: Sequence[GenerationRequest]) -> int:
    """Tokens of all answers together."""
    return sum(min(request.params.max_tokens, request.params.min_tokens + 1) for request in requests)


def always_say_eos(tensors: dict[str, Tensor], eos_token_id: int) -> None:
    """Change weights, in place, so that EOS has a logit about 64 above all others; other logits hardly change.

    The head reads the final norm's output: a bias on one of its dimensions that only the head's row of EOS looks at.
    """
    head = next(name for name in tensors if name.endswith("embed_out.weight"))
    bias = tensors[head.removesuffix("embed_out.weight") + "gpt_neox.final_layer_norm.bias"]
    bias[0] = EOS_SCALE
    tensors[head][eos_token_id] = 0
    tensors[head][eos_token_id, 0] = EOS_SCALE


def shuffled_pool(capacity: int) -> PagePool:
    """A pool that hands pages out in random order, as one does that has been used for long."""
    order = torch.randperm(capacity, generator=torch.Generator().manual_seed(0)) + 1
    return PagePool(capacity, order.tolist())
