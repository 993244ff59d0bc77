"""A first layer by token, against the layer as checkpoints have it, and what the token decoder makes of it."""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from engine.config import BlockTransformerConfig, ModelConfig
from engine.model.build import build_model
from engine.model.layers import Layer
from engine.model.model import Model
from engine.model.naive import naive_model
from engine.model.token_table import TOKENS_AT_ONCE, first_layer_table, token_table
from kernels.dispatch import torch_kernels
from tests.engine.helpers import DEVICES
from tests.engine.model.test_layers import WIDTH, checkpoint
from tests.engine.model.test_model import (
    VANILLA,
    VOCAB,
    lively_weights,
    model_config,
    random_ids,
    served_results,
)

EPS = 1e-3
EMBEDDINGS = "token_decoder.gpt_neox.embed_in.weight"
PREFIX, SUMMATION = model_config("prefix", length=4, prefix=2), model_config("summation", length=4, prefix=0)
ONE_TOKEN = model_config("prefix", length=1, prefix=1)


def with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same with so many layers of the token decoder."""
    assert isinstance(config, BlockTransformerConfig)
    return config.model_copy(update={"token_decoder": config.token_decoder.model_copy(update={"num_layers": layers})})


def entries(embeddings: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The table by the formula, with all of a layer's norms and products."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"layer.{name}.weight"], tensors[f"layer.{name}.bias"])

    def norm(name: str) -> Tensor:
        weight, bias = tensors[f"layer.{name}.weight"], tensors[f"layer.{name}.bias"]
        return F.layer_norm(embeddings, (WIDTH,), weight, bias, EPS)

    qkv = linear(norm("input_layernorm"), "attention.query_key_value")
    ffn = linear(F.gelu(linear(norm("post_attention_layernorm"), "mlp.dense_h_to_4h")), "mlp.dense_4h_to_h")
    return torch.cat((qkv, embeddings + ffn + tensors["layer.attention.dense.bias"]), dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, TOKENS_AT_ONCE + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_are_exact_but_for_one_rounding(dtype: torch.dtype, tokens: int, device: str) -> None:
    tensors = checkpoint(dtype)
    embeddings = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    table = token_table(embeddings.to(device), Layer.of(there, "layer", torch.float32), EPS)
    assert table.dtype == dtype
    assert table.is_contiguous()
    exact = entries(embeddings.double(), {name: tensor.double() for name, tensor in tensors.items()})
    assert_close(table.cpu().double(), exact, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=2e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_any_token_at_any_place_predicts_as_the_naive_model(layers: int) -> None:
    """Every id of the vocabulary, that of padding and end-of-text too, at every place of a block."""
    config = with_layers(PREFIX, layers)
    model = build_model(config, lively_weights(config), torch_kernels())
    naive = naive_model(config, lively_weights(config), torch.float64)
    contexts = torch.randn(VOCAB, config.block_decoder.hidden_size, generator=torch.Generator().manual_seed(2))
    blocks = (torch.arange(VOCAB)[:, None] + 13 * torch.arange(4)) % VOCAB
    assert all(set(place.tolist()) == set(range(VOCAB)) for place in blocks.T)
    logits: list[Tensor] = []

    def choose(some: Tensor, place: int) -> Tensor:
        logits.append(some)
        return blocks[:, place]

    model.write_block(contexts, model.new_scratch(VOCAB), choose)
    expected = naive.block_logits(contexts.double(), blocks)
    assert_close(torch.stack(logits, dim=1).double(), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "products", "gelus"),
    [
        # The expansion; two layers of the prefix; three times a layer and the first one's attention; the heads.
        (PREFIX, 1 + 2 * 2 + 3 * (1 + 2) + 4, 2 + 3),
        (SUMMATION, 1 + 4 * (2 * 2) + 4, 4 * 2),
        (ONE_TOKEN, 1 + 2 * 2 + 1, 2),
    ],
    ids=["prefix", "summation", "one token"],
)
def test_tokens_skip_what_the_table_holds(config: ModelConfig, products: int, gelus: int) -> None:
    assert isinstance(config, BlockTransformerConfig)
    plain, counted, width = torch_kernels(), {"products": 0, "gelus": 0}, config.token_decoder.hidden_size

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        counted["products"] += 1
        return plain.linear(x, weight, bias)

    def local_attention_and_gelu(into: Tensor, *arguments: Any) -> None:
        counted["gelus"] += into.shape[2] > 3 * width
        plain.local_attention_and_gelu(into, *arguments)

    kernels = replace(plain, linear=linear, local_attention_and_gelu=local_attention_and_gelu)
    model = build_model(config, lively_weights(config), kernels)
    written = write(model)
    assert written.shape == (3, config.block_length)
    assert counted == {"products": products, "gelus": gelus}


@pytest.mark.parametrize(
    ("config", "name", "kept"),
    [(PREFIX, EMBEDDINGS, False), (SUMMATION, EMBEDDINGS, True), (VANILLA, "gpt_neox.embed_in.weight", False)],
    ids=["prefix", "summation", "vanilla"],
)
def test_the_table_takes_the_place_of_the_embeddings(config: ModelConfig, name: str, kept: bool) -> None:
    tensors = lively_weights(config)
    model, embeddings = build_model(config, tensors, torch_kernels()), weakref.ref(tensors[name])
    del tensors
    assert (embeddings() is not None) == kept
    write(model)


def test_a_cpu_is_spared_the_table_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = lively_weights(VANILLA)
    embeddings = tensors["gpt_neox.embed_in.weight"]
    assert first_layer_table(tensors, "gpt_neox", EPS).shape == (VOCAB, 4 * embeddings.shape[1])
    monkeypatch.setattr("engine.model.token_table.CPU_WORK", 2.0 * embeddings.numel() * (3 * 96 + 2 * 112) - 1)
    assert first_layer_table(tensors, "gpt_neox", EPS) is embeddings
    # What is made of the embeddings is the same.
    ids = random_ids(VANILLA, rows=5, blocks=26)
    naive = naive_model(VANILLA, tensors, torch.float64).forward(ids)
    for row, position, context, _logits in served_results(VANILLA, ids, torch.float32):
        assert_close(context.double(), naive.context_embeddings[row, position], atol=2e-5, rtol=1e-5)


def write(model: Model) -> Tensor:
    """A greedy block for each of three rows."""
    contexts = torch.randn(3, model.config.block_decoder.hidden_size, generator=torch.Generator().manual_seed(3))
    return model.write_block(contexts, model.new_scratch(3), lambda logits, _place: logits.argmax(-1))
