"""The layers for few positions against the ordinary ones and the naive model, with the twins and with Triton."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from engine.config import ModelConfig
from engine.model.build import build_model
from engine.model.few_positions import FewPositions
from engine.model.layers import LayerStack
from engine.model.model import Model
from engine.model.naive import naive_model
from kernels.dispatch import Kernels, torch_kernels, triton_kernels
from tests.engine.model.test_model import CONFIGS, lively_weights, name_of, random_ids
from tests.kernels.conftest import CASES, called_from_cpu

FEW = replace(torch_kernels(), late_norm_positions=16)
BLOCK_CONFIGS = CONFIGS[:-1]


def written_logits(model: Model, contexts: Tensor, blocks: Tensor) -> Tensor:
    """Logits [R, L, V] of blocks [R, L] that are forced."""
    seen: list[Tensor] = []

    def choose(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return blocks[:, place]

    model.write_block(contexts, model.new_scratch(len(contexts)), choose)
    return torch.stack(seen, dim=1)


def naive_case(config: ModelConfig, weights: dict[str, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, the blocks that follow them, and their logits, in fp64."""
    ids = random_ids(config, rows=rows, blocks=2)
    naive = naive_model(config, weights, torch.float64).forward(ids)
    return naive.context_embeddings[:, 0], ids[:, 1], naive.logits[:, 0]


def only_few(kernels: Kernels) -> Kernels:
    """Kernels without what only other layers use."""

    def unexpected(x: Tensor, _branch: Tensor | None, _eps: float) -> tuple[Tensor, Tensor]:
        raise AssertionError(f"a norm in front of the product of {len(x)} positions")

    return replace(kernels, residual_normalise=unexpected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("config", BLOCK_CONFIGS, ids=name_of)
def test_equals_naive(config: ModelConfig, rows: int) -> None:
    weights = lively_weights(config)
    contexts, blocks, expected = naive_case(config, weights, rows)
    ours = written_logits(build_model(config, weights, only_few(FEW)), contexts.float(), blocks)
    assert_close(ours.double(), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=name_of)
def test_triton_equals_naive(config: ModelConfig) -> None:
    weights = lively_weights(config)
    contexts, blocks, expected = naive_case(config, weights, rows=2)
    kernels = called_from_cpu(only_few(triton_kernels()), CASES[-1][1])
    ours = written_logits(build_model(config, weights, kernels), contexts.float(), blocks)
    assert_close(ours.double(), expected, atol=5e-5, rtol=1e-4)


def test_bfloat16_is_as_exact_as_a_norm_in_front() -> None:
    config = CONFIGS[0]
    weights = {name: tensor.bfloat16() for name, tensor in lively_weights(config).items()}
    contexts, blocks, exact = naive_case(config, weights, rows=8)
    errors = [
        (written_logits(build_model(config, weights, kernels), contexts.bfloat16(), blocks).double() - exact).abs()
        for kernels in (FEW, torch_kernels())
    ]
    assert not torch.equal(*errors)
    assert errors[0].mean() <= 1.2 * errors[1].mean()
    assert errors[0].max() <= 1.5 * errors[1].max()


def test_which_suit() -> None:
    config = CONFIGS[0]
    stack = LayerStack(config.block_decoder, lively_weights(config), "block_decoder.gpt_neox", FEW)
    few = FewPositions(stack)
    width = config.block_decoder.hidden_size
    assert [few.suit(torch.zeros(rows, width)) for rows in (1, 16, 17)] == [True, True, False]
    assert few.suit(torch.zeros(1, width, dtype=torch.bfloat16))
    assert not few.suit(torch.zeros(1, width, dtype=torch.float16)), "a stream's product may leave its range"
    stack = LayerStack(config.block_decoder, lively_weights(config), "block_decoder.gpt_neox", torch_kernels())
    assert not FewPositions(stack).suit(torch.zeros(1, width)), "on the CPU a launch costs nothing"
