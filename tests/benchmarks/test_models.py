import math

import pytest
import torch

from benchmarks.models import CONTROLS, MODELS, WORKLOADS, BenchmarkModel
from engine.config import BlockTransformerConfig
from engine.kv_cache import KVLayout
from engine.weights import expected_shapes


@pytest.mark.parametrize(
    ("name", "kv_bytes", "parameters"),
    [
        ("block-1.2B", 24_576, 1_210_000_000),
        ("block-302M", 12_288, 302_000_000),
        ("block-85M", 4_608, 85_000_000),
        ("vanilla-302M", 98_304, 302_000_000),
        ("vanilla-85M", 36_864, 85_000_000),
        ("vanilla-19M", 12_288, 18_900_000),
    ],
)
def test_the_shapes_are_those_of_the_paper(name: str, kv_bytes: int, parameters: int) -> None:
    config = MODELS[name].config
    page_size = 16
    layout = KVLayout.of(config.block_decoder, page_size, torch.bfloat16)
    assert layout.page_bytes / (page_size * config.block_length) == kv_bytes
    layers = sum(math.prod(shape) for name, shape in expected_shapes(config).items() if ".layers." in name)
    assert layers == pytest.approx(parameters, rel=0.005)


def test_decoders_have_the_heads_of_the_paper() -> None:
    heads = {name: model.config.block_decoder.num_heads for name, model in MODELS.items()}
    assert heads == {
        "block-1.2B": 16, "block-302M": 16, "block-85M": 12, "vanilla-302M": 16, "vanilla-85M": 12, "vanilla-19M": 8,
    }  # fmt: skip
    for model in MODELS.values():
        if isinstance(model.config, BlockTransformerConfig):
            assert model.config.token_decoder.num_heads == model.config.block_decoder.num_heads


def test_every_block_model_has_a_control() -> None:
    kinds = {name: isinstance(model.config, BlockTransformerConfig) for name, model in MODELS.items()}
    assert set(CONTROLS) == {name for name, is_block in kinds.items() if is_block}
    assert set(CONTROLS.values()) == {name for name, is_block in kinds.items() if not is_block}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_full_batch_of_decode_heavy_requests_fits_the_card(model: BenchmarkModel) -> None:
    workload = WORKLOADS["D"]
    positions = -(-(workload.prompt_tokens + workload.answer_tokens) // model.config.block_length)
    position_bytes = KVLayout.of(model.config.block_decoder, 16, torch.bfloat16).page_bytes // 16
    assert model.rows * positions * position_bytes < 120e9


@pytest.mark.parametrize("name", MODELS)
def test_every_workload_fits_in_the_model(name: str) -> None:
    longest = max(workload.prompt_tokens + workload.answer_tokens for workload in WORKLOADS.values())
    assert MODELS[name].config.max_length == longest == 9216


def test_a_floor_holds_for_what_it_was_measured_for_only() -> None:
    model = MODELS["block-1.2B"]
    assert model.floor("D", rows=1024, dtype="bfloat16", device="NVIDIA H200") == 208_000
    assert model.floor("D", rows=512, dtype="bfloat16", device="NVIDIA H200") is None
    assert model.floor("D", rows=1024, dtype="float32", device="NVIDIA H200") is None
    assert model.floor("D", rows=1024, dtype="bfloat16", device="cpu") is None
