"""A layer's two products against the norms and the four products of its checkpoint."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from engine.model.layers import Layer

WIDTH, INNER = 16, 40
PARTS = {
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
    "attention.query_key_value": (3 * WIDTH, WIDTH),
    "attention.dense": (WIDTH, WIDTH),
    "mlp.dense_h_to_4h": (INNER, WIDTH),
    "mlp.dense_4h_to_h": (WIDTH, INNER),
}


def checkpoint(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in PARTS.items():
        tensors[f"layer.{name}.weight"] = torch.randn(shape, generator=generator).to(dtype)
        tensors[f"layer.{name}.bias"] = torch.randn(shape[0], generator=generator).to(dtype)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_exact_but_for_one_rounding(dtype: torch.dtype) -> None:
    layer = Layer.of(tensors := checkpoint(dtype), "layer")
    exact = {name.removeprefix("layer."): tensor.double() for name, tensor in tensors.items()}

    def behind(norm: str, linear: str) -> tuple[Tensor, Tensor]:
        weight = exact[f"{linear}.weight"].t()
        scaled = exact[f"{norm}.weight"][:, None] * weight
        # What is normalised has a mean of zero: taking each column's from it makes no difference.
        return scaled - scaled.mean(0), exact[f"{linear}.bias"] + exact[f"{norm}.bias"] @ weight

    first = behind("input_layernorm", "attention.query_key_value")
    second = behind("post_attention_layernorm", "mlp.dense_h_to_4h")
    down = torch.cat((exact["attention.dense.weight"], exact["mlp.dense_4h_to_h.weight"]), dim=1).t()
    down_bias = exact["attention.dense.bias"] + exact["mlp.dense_4h_to_h.bias"]
    half_unit = torch.finfo(dtype).eps / 2
    for ours, wanted in (
        (layer.into.weight, torch.cat((first[0], second[0]), dim=1)),
        (layer.into.bias, torch.cat((first[1], second[1]))),
        (layer.out_of.weight, down),
        (layer.out_of.bias, down_bias),
    ):
        assert ours is not None
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert_close(ours.double(), wanted, rtol=1.01 * half_unit, atol=2e-6)
