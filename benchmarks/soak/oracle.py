"""Whether an answer given in a full batch is the one that the same request gets alone.

The two may differ by rounding: matrix products of different batch shapes round differently. So the first token that
differs is put to the naive model in float32, over the tokens that both answers share: with the request's noise, both
candidates have to score within `tie` of its best. In float32 that is 1e-4. In bfloat16 it is 0.03: of 72 tokens that
block-302M chose in a batch of six on the CPU, the one furthest below the oracle's best was 0.0025 off, while a token
from another row's context, cache or noise lies whole units below it (50304 scores with a deviation of 0.64 and, where
sampled, Gumbel noise). What comes after the first difference is a different text, and is not compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.soak.traffic import Answer, Ask
from engine.alignment import align_prompt
from engine.config import ModelConfig
from engine.model.naive import naive_model
from kernels.sampler import SamplingTables, perturbed_scores


@dataclass(frozen=True)
class Difference:
    """Two answers to one request that are not the same."""

    ask: Ask
    place: int
    """Index of the first token that differs."""
    deficit: float
    """How far the lower of the two tokens scores below the oracle's best; infinite where one answer merely ends."""


class Oracle:
    """The naive model in float32 with the served weights."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self._config = config
        self._naive = naive_model(config, tensors)

    def compare(self, ask: Ask, first: Answer, second: Answer) -> Difference:
        """How two unequal answers differ."""
        pairs = enumerate(zip(first.token_ids, second.token_ids, strict=False))
        place = next((place for place, (a, b) in pairs if a != b), None)
        if place is None:
            return Difference(ask, min(len(first.token_ids), len(second.token_ids)), float("inf"))
        scores = self.scores(ask, first.token_ids[:place])
        lower = min(float(scores[answer.token_ids[place]]) for answer in (first, second))
        return Difference(ask, place, float(scores.max()) - lower)

    @torch.inference_mode()
    def scores(self, ask: Ask, before: Sequence[int]) -> Tensor:
        """Perturbed scores [V] of the token that follows the prompt and `before`."""
        config = self._config
        length = config.block_length
        prompt = align_prompt(ask.prompt, length, config.prompt_alignment, config.pad_token_id)
        tokens = [*prompt.blocks.ravel().tolist(), *prompt.forced, *before]
        whole = len(tokens) // length * length
        blocks = torch.tensor(tokens[:whole]).view(1, -1, length)
        begun = tokens[whole:]
        context = self._naive.contexts(self._naive.embed(blocks))[:, -1]
        block = torch.tensor([begun + [0] * (length - len(begun))])
        logits = self._naive.block_logits(context, block)[:, len(begun)]
        row, place = torch.zeros(1, dtype=torch.int32), torch.tensor([len(before)], dtype=torch.int32)
        return perturbed_scores(logits, row, place, _tables(ask))[0]


def _tables(ask: Ask) -> SamplingTables:
    return SamplingTables(
        temperature=torch.tensor([ask.temperature], dtype=torch.float32),
        top_k=torch.tensor([ask.top_k], dtype=torch.int32),
        top_p=torch.tensor([ask.top_p], dtype=torch.float32),
        min_p=torch.zeros(1),
        seed=torch.tensor([ask.seed], dtype=torch.int64),
        suppress_until=torch.zeros(1, dtype=torch.int32),
        suppressed_ids=torch.full((1, 1), -1, dtype=torch.int32),
    )
