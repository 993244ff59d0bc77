"""Reads the golden cases; README.md beside this file describes them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from engine.config import ModelConfig
from engine.weights import load_weights

DIRECTORY = Path(__file__).parent
BLOCK_VARIANTS = ("lookup_prefix2", "lookup_prefix1", "lookup_projection", "lookup_summation")
VANILLA = "vanilla_gptneox"
VARIANTS = (*BLOCK_VARIANTS, VANILLA)
FORWARD_CASES = [
    (variant, case)
    for variant in BLOCK_VARIANTS
    for case in ("full", "leftpad", "rightpad_eos", "rightpad_eos_noskip", "eval_pppa")
] + [(VANILLA, "full"), (VANILLA, "leftpad")]
COMPARABLE = dict.fromkeys(BLOCK_VARIANTS, 47) | {VANILLA: 40}
"""Rows of generations that there are at least."""


@dataclass(frozen=True)
class Generation:
    """One generation of the reference; `output` [B, T] begins with `prompt` [B, P] and may lack up to L-1 tokens."""

    name: str
    stops_at_eos: bool
    max_length: int
    prompt: Tensor
    output: Tensor
    mask: Tensor | None
    step_logits: Tensor | None
    context_embeddings: Tensor | None
    comparable_rows: tuple[int, ...]
    """Rows of the batch that a single run of the same prompt equals."""

    def expected(self, row: int) -> list[int]:
        """The new tokens of a row; behind end-of-text the reference fills up, which is cut."""
        tokens: list[int] = self.output[row, self.prompt.shape[1] :].tolist()
        return tokens[: tokens.index(0) + 1] if self.stops_at_eos and 0 in tokens else tokens

    def row_prompt(self, row: int) -> list[int]:
        """A row's prompt without the padding in front."""
        ids: list[int] = self.prompt[row].tolist()
        return ids if self.mask is None else ids[-int(self.mask[row].sum()) :]


@cache
def config(variant: str) -> ModelConfig:
    """The model's config."""
    return ModelConfig.load(DIRECTORY / variant)


@cache
def weights(variant: str) -> dict[str, Tensor]:
    """The model's weights in fp32."""
    return load_weights(DIRECTORY / variant, config(variant), torch.float32, torch.device("cpu"))


@cache
def _tensors(variant: str) -> dict[str, Tensor]:
    return load_file(DIRECTORY / variant / "cases.safetensors")


def assert_logits(ours: Tensor, golden: Tensor) -> None:
    """Compare logits within the tolerance of fp32 against fp32."""
    assert_close(ours, golden, atol=1e-4, rtol=1e-4)


def assert_embeddings(ours: Tensor, golden: Tensor) -> None:
    """Compare block or context embeddings within the tolerance of fp32 against fp32."""
    assert_close(ours, golden, atol=2e-5, rtol=1e-5)


def forward_case(variant: str, name: str) -> Mapping[str, Tensor]:
    """The tensors of a forward case by role; those of the vanilla model as blocks of one token."""
    prefix = f"fwd/{name}/"
    case = {key.removeprefix(prefix): tensor for key, tensor in _tensors(variant).items() if key.startswith(prefix)}
    return _as_blocks(case) if variant == VANILLA else case


def _as_blocks(case: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """input_ids [B, T] and the rest, where logits [B, T, V] predict the token behind, in the form of block models."""
    mask = case.get("attention_mask", torch.ones_like(case["input_ids"]))
    return {
        "input_ids": case["input_ids"][..., None],
        "attention_mask": mask[..., None],
        "block_attention_mask": mask,
        "context_embeddings": case["final_hidden"],
        "logits": case["logits"][:, :-1, None],
        "valid": case.get("valid", mask)[:, :-1, None],
    }


@cache
def generations(variant: str) -> tuple[Generation, ...]:
    """The generations that the served semantics reproduce: with training's positions, prompts given as token ids."""
    cases = json.loads((DIRECTORY / variant / "cases.json").read_text())
    position_mode = "train" if cases.get("prefix_position_quirk") else "reference"
    found = []
    for case in cases["generation_cases"]:
        tensors = {role: _tensors(variant)[place["key"]] for role, place in case["tensors"].items()}
        if case.get("position_mode", "reference") != position_mode or tensors["prompt"].dim() != 2:
            continue
        rows = len(tensors["prompt"])
        comparable = case.get("rows_equal_to_single_run", [True] * rows)
        found.append(
            Generation(
                name=case["name"],
                stops_at_eos=case["eos_stopping"],
                max_length=case["max_length"],
                prompt=tensors["prompt"],
                output=tensors["output"],
                mask=tensors.get("attention_mask"),
                step_logits=tensors.get("step_logits"),
                context_embeddings=tensors.get("context_embeddings"),
                comparable_rows=tuple(row for row in range(rows) if comparable[row]),
            )
        )
    return tuple(found)
