"""The stack of GPT-NeoX layers that both decoders consist of.

A layer with parallel residual: x' = x + attention(norm1(x)) + ffn(norm2(x)). The stack knows nothing of where keys and
values live: it hands each layer's fused projection to the decoder's own attention.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.config import DecoderConfig
from kernels.dispatch import Kernels

Attend = Callable[[int, Tensor], Tensor]
"""(layer, fused query-key-value projection [N, 3 * H]) -> attention's output in front of its last product [N, H]."""


@dataclass(frozen=True)
class Norm:
    """Weight and bias of a layer norm, [H] each."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Norm":
        """The layer norm that a checkpoint calls `name`."""
        return cls(tensors[f"{name}.weight"], tensors[f"{name}.bias"])


@dataclass(frozen=True)
class Linear:
    """A linear map: weight [in, out] (transposed from the checkpoint: see `kernels.linear`) and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Linear":
        """The linear map that a checkpoint calls `name`; a convolution of kernel 1 is one, too."""
        weight = tensors[f"{name}.weight"]
        return cls(weight.flatten(1).t().contiguous(), tensors.get(f"{name}.bias"))


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; `query_key_value` is laid out [query | key | value] a head."""

    attention_norm: Norm
    ffn_norm: Norm
    query_key_value: Linear
    attention_out: Linear
    ffn_up: Linear
    ffn_down: Linear

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Layer":
        """The layer that a checkpoint calls `name`."""
        return cls(
            attention_norm=Norm.of(tensors, f"{name}.input_layernorm"),
            ffn_norm=Norm.of(tensors, f"{name}.post_attention_layernorm"),
            query_key_value=Linear.of(tensors, f"{name}.attention.query_key_value"),
            attention_out=Linear.of(tensors, f"{name}.attention.dense"),
            ffn_up=Linear.of(tensors, f"{name}.mlp.dense_h_to_4h"),
            ffn_down=Linear.of(tensors, f"{name}.mlp.dense_4h_to_h"),
        )


class LayerStack:
    """The layers of one decoder and its final layer norm."""

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Tensor], name: str, kernels: Kernels) -> None:
        """Weights are those that `tensors` holds under `name`, for example "block_decoder.gpt_neox"."""
        self.config = config
        self.kernels = kernels
        self.layers = tuple(Layer.of(tensors, f"{name}.layers.{index}") for index in range(config.num_layers))
        self.final_norm = Norm.of(tensors, f"{name}.final_layer_norm")

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply a linear map to x [N, in]; returns [N, out]."""
        return self.kernels.linear(x, linear.weight, linear.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """All layers and the final norm: x [N, H] -> [N, H]."""
        x, attention, ffn = self._run(x, attend, self.layers)
        norm, eps = self.final_norm, self.config.layer_norm_eps
        return self.kernels.residual_layer_norm(x, attention, ffn, norm.weight, norm.bias, eps)

    def project_only(self, x: Tensor, attend: Attend, project: Callable[[int, Tensor], object]) -> None:
        """As much of `forward` as keys and values need: the last layer stops at its projection, which `project` gets.

        x: [N, H]. The last layer's attention and FFN, and the final norm, would only make an output that nobody reads.
        """
        layers, last = self.layers[:-1], self.layers[-1]
        x, attention, ffn = self._run(x, attend, layers)
        norm, eps = last.attention_norm, self.config.layer_norm_eps
        normed = self.kernels.residual_layer_norm(x, attention, ffn, norm.weight, norm.bias, eps)
        project(len(layers), self.linear(normed, last.query_key_value))

    def _run(self, x: Tensor, attend: Attend, layers: Sequence[Layer]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The residual stream behind `layers`, and the last one's two branches, not yet added to it."""
        attention, ffn = None, None
        for index, layer in enumerate(layers):
            first, second = layer.attention_norm, layer.ffn_norm
            x, for_attention, for_ffn = self.kernels.residual_layer_norms(
                x, attention, ffn, first.weight, first.bias, second.weight, second.bias, self.config.layer_norm_eps
            )
            attention = self.linear(
                attend(index, self.linear(for_attention, layer.query_key_value)), layer.attention_out
            )
            inner = self.kernels.linear_gelu(for_ffn, layer.ffn_up.weight, layer.ffn_up.bias)
            ffn = self.linear(inner, layer.ffn_down)
        return x, attention, ffn
