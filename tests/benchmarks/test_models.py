import math

import pytest
import torch

from benchmarks.models import MODELS, WORKLOADS
from engine.kv_cache import KVLayout
from engine.weights import expected_shapes


@pytest.mark.parametrize(
    ("name", "kv_bytes", "parameters"),
    [
        ("block-1.2B", 24_576, 1_210_000_000),
        ("block-302M", 12_288, 302_000_000),
        ("block-85M", 4_608, 85_000_000),
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
    heads = {name: model.config.block_decoder.head_size for name, model in MODELS.items()}
    assert heads == {"block-1.2B": 128, "block-302M": 64, "block-85M": 64}
    assert all(model.config.token_decoder.head_size == heads[name] for name, model in MODELS.items())


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
