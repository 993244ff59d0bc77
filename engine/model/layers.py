"""The stack of GPT-NeoX layers that both decoders consist of.

A layer with parallel residual, x' = x + attention(norm1(x)) + ffn(norm2(x)), is two products here. Both norms see the
same x, so their weights and biases are folded into the products behind them, which become one; and the sum of the
branches' last products is a product of what they multiply, side by side:

    n            = (x - mean(x)) / sqrt(var(x) + eps)
    [qkv | up]   = n @ C [diag(w1) Wqkv | diag(w2) Wup] + [bqkv + b1 Wqkv | bup + b2 Wup]
    x'           = x + [attention(qkv) | gelu(up)] @ [Wout ; Wdown] + bout + bdown

C takes each column's mean from it. n, whose mean is zero, does not notice; x @ C W is (x - mean(x)) @ W, on which
`engine.model.few_positions` builds.

The stack knows nothing of where keys and values live: what lies between the products is the decoder's own.
Letters in shapes: N positions, H width, F inner width of the FFN.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import DecoderConfig
from kernels.dispatch import Kernels

Between = Callable[[int, Tensor, Tensor], None]
"""(layer, [qkv | up] [N, 3 * H + F], out [N, H + F]): writes [attention(qkv) | gelu(up)], or without up the former.

qkv is laid out [query | key | value] a head. The first buffer may be overwritten.
"""
Attend = Callable[[int, Tensor, Tensor], None]
"""(layer, qkv [N, 3 * H], out [N, H]): writes attention(qkv) alone. Both are parts of wider buffers."""


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
    """The two products of a layer, in place of the checkpoint's norms and four products."""

    into: Linear
    """From the normalised x [N, H] to [qkv | up] [N, 3 * H + F]; the weight's columns sum to zero."""
    out_of: Linear
    """From [attention | gelu(up)] [N, H + F] to what is added to x [N, H]."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None) -> "Layer":
        """The layer that a checkpoint calls `name`. Merged in fp32, rounded once to `dtype` (or the checkpoint's)."""

        def tensor(part: str) -> Tensor:
            return tensors[f"{name}.{part}"].float()

        def behind(norm: str, linear: str) -> tuple[Tensor, Tensor]:
            weight, bias = tensor(f"{linear}.weight"), tensor(f"{linear}.bias")
            scaled = weight * tensor(f"{norm}.weight")
            return scaled - scaled.mean(1, keepdim=True), torch.addmv(bias, weight, tensor(f"{norm}.bias"))

        dtype = dtype or tensors[f"{name}.attention.dense.weight"].dtype
        weights, biases = zip(
            behind("input_layernorm", "attention.query_key_value"),
            behind("post_attention_layernorm", "mlp.dense_h_to_4h"),
            strict=True,
        )
        last = torch.cat((tensor("attention.dense.weight"), tensor("mlp.dense_4h_to_h.weight")), dim=1)
        last_bias = tensor("attention.dense.bias") + tensor("mlp.dense_4h_to_h.bias")
        return cls(
            into=Linear(torch.cat(weights).to(dtype).t().contiguous(), torch.cat(biases).to(dtype)),
            out_of=Linear(last.to(dtype).t().contiguous(), last_bias.to(dtype)),
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

    def gelu_behind(self, attend: Attend) -> Between:
        """For attention that does not take up's GELU along: a launch of its own."""
        width = self.config.hidden_size

        def between(layer: int, into: Tensor, inner: Tensor) -> None:
            attend(layer, into[:, : 3 * width], inner[:, :width])
            if inner.shape[1] > width:
                self.kernels.gelu_into(into[:, 3 * width :], inner[:, width:])

        return between

    def forward(self, x: Tensor, between: Between) -> Tensor:
        """All layers and the final norm: x [N, H] -> [N, H].

        In place of embeddings of tokens x may be their entries [N, 4 * H] of `engine.model.token_table`, overwritten.
        """
        x, branch, first = self.begin(x, between)
        x, branch = self._run(x, branch, between, self.layers[first:], first)
        norm = self.final_norm
        return self.kernels.residual_layer_norm(x, branch, norm.weight, norm.bias, self.config.layer_norm_eps)

    def project_only(self, x: Tensor, between: Between, project: Callable[[int, Tensor], object]) -> None:
        """As much of `forward` as keys and values need: of the last layer its qkv [N, 3 * H], which `project` gets.

        x as `forward` has it. The last layer's attention and FFN, and the final norm, would only make an output that
        nobody reads.
        """
        end, last = 3 * self.config.hidden_size, len(self.layers) - 1
        if last == 0 and x.shape[1] > end:
            project(0, x[:, :end])
            return
        x, branch, first = self.begin(x, between)
        x, branch = self._run(x, branch, between, self.layers[first:last], first)
        _, normed = self.kernels.residual_normalise(x, branch, self.config.layer_norm_eps)
        into = self.layers[last].into
        assert into.bias is not None
        project(last, self.linear(normed, Linear(into.weight[:, :end], into.bias[:end])))

    def begin(self, x: Tensor, between: Between) -> tuple[Tensor, Tensor | None, int]:
        """The residual stream, what is to be added to it, and the layer that gets both, for an x as `forward` has it.

        Of entries, the first layer is attention and its product: x' = the entry's x + attention @ Wout.
        """
        width = self.config.hidden_size
        if x.shape[1] == width:
            return x, None, 0
        qkv, x = x.tensor_split((3 * width,), dim=1)
        attended = x.new_empty(len(x), width)
        between(0, qkv, attended)
        return x, self.linear(attended, Linear(self.layers[0].out_of.weight[:width], None)), 1

    def _run(
        self, x: Tensor, branch: Tensor | None, between: Between, layers: Sequence[Layer], first: int
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream behind `layers`, and what the last one has yet to add to it.

        Given both as they are in front of them; the first of `layers` is the stack's layer `first`.
        """
        for index, layer in enumerate(layers, first):
            x, normed = self.kernels.residual_normalise(x, branch, self.config.layer_norm_eps)
            into = self.linear(normed, layer.into)
            inner = x.new_empty(len(x), layer.out_of.weight.shape[0])
            between(index, into, inner)
            branch = self.linear(inner, layer.out_of)
        return x, branch
