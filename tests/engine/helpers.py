"""Small real models for engine tests: the golden random-weight models, whose greedy choices have clear margins."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig, PromptAlignment
from engine.core import EngineCore
from engine.model.build import build_model
from engine.model.naive import NaiveAnswer, naive_model
from engine.types import GenerationRequest
from engine.weights import load_weights
from kernels.dispatch import Kernels, select_kernels

GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

MAX_POSITIONS = 32
"""Of block models."""
MIN_LENGTH = 128
"""Tokens that the longest of the golden generations, and of the tests' requests, fit in."""
TIE = 1e-4
"""design: a first differing token is accepted only where the oracle's two best scores lie this close."""


@dataclass(frozen=True)
class GoldenModel:
    """A golden model and what a test changes of its config; short, so that a few pages make a pool."""

    variant: str
    alignment: PromptAlignment = "left_pad"
    eos_token_id: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of eight positions in float32."""
        decoder = self.config.block_decoder
        return 2 * decoder.num_layers * decoder.hidden_size * 8 * 4

    @property
    def config(self) -> ModelConfig:
        """The config with the changes."""
        config = ModelConfig.load(GOLDEN / self.variant)
        update = {
            "prompt_alignment": self.alignment,
            "eos_token_id": self.eos_token_id,
            "max_length": max(MAX_POSITIONS * config.block_length, MIN_LENGTH),
        }
        return config.model_copy(update=update)

    def core(
        self, *, kernels: Kernels | None = None, tensors: Mapping[str, Tensor] | None = None, **options: object
    ) -> EngineCore:
        """An engine core in float32, with other kernels or weights than usual; `options` are fields of EngineConfig."""
        config = EngineConfig.create(**options)
        device = torch.device(config.device)
        kernels = kernels or select_kernels(device)
        weights = golden_tensors(self.variant) if tensors is None else tensors
        tensors = {name: tensor.to(device) for name, tensor in weights.items()}
        model = build_model(self.config, tensors, kernels)
        return EngineCore(name=self.variant, config=config, model=model, kernels=kernels)

    def oracle(self, request: GenerationRequest) -> NaiveAnswer:
        """The naive model's answer."""
        naive = naive_model(self.config, golden_tensors(self.variant))
        return naive.generate(request.prompt_token_ids, request.params)


@cache
def golden_tensors(variant: str) -> dict[str, Tensor]:
    """The weights of a golden model in float32."""
    return load_weights(GOLDEN / variant, ModelConfig.load(GOLDEN / variant), torch.float32, CPU)


def is_tie(answer: NaiveAnswer, token_ids: list[int]) -> bool:
    """Whether `token_ids` first differ from the oracle's answer at a token where it had a near tie.

    Raises AssertionError where they differ anywhere else; False where they are equal.
    """
    expected = list(answer.token_ids)
    if token_ids == expected:
        return False
    place = next((i for i, (a, b) in enumerate(zip(token_ids, expected, strict=False)) if a != b), None)
    assert place is not None, (
        f"{len(token_ids)} tokens came, {len(expected)} were expected, all equal as far as they go"
    )
    margin = answer.margins[place]
    assert margin <= TIE, f"token {place} is {token_ids[place]}, not {expected[place]}, and the margin is {margin}"
    return True
