"""GPT-NeoX layers written down plainly, for the naive models.

Letters in shapes: B sequences, T positions, H width, D head size.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import DecoderConfig


class NaiveDecoder:
    """The layers and the final norm that a checkpoint holds under a name, causal, without any cache."""

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Tensor], name: str) -> None:
        self._config = config
        self._tensors = tensors
        self._name = name

    def forward(self, x: Tensor, keys_seen: Tensor | None = None) -> Tensor:
        """x [B, T, H] at positions 0..T-1 -> [B, T, H]; keys_seen [B, T] bool takes keys away where it is False."""
        length = x.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None]
        if keys_seen is not None:
            visible = visible & keys_seen[:, None]
        for index in range(self._config.num_layers):
            layer = f"{self._name}.layers.{index}"
            for_attention = self._norm(f"{layer}.input_layernorm", x)
            for_ffn = self._norm(f"{layer}.post_attention_layernorm", x)
            inner = self._linear(f"{layer}.mlp.dense_h_to_4h", for_ffn)
            gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            attention = self._attention(f"{layer}.attention", for_attention, visible)
            x = x + attention + self._linear(f"{layer}.mlp.dense_4h_to_h", gelu)
        return self._norm(f"{self._name}.final_layer_norm", x)

    def _attention(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        """Attention over x [B, T, H]; visible [B or 1, T, T] is True where a query (row) sees a key (column)."""
        config = self._config
        heads = self._linear(f"{name}.query_key_value", x).unflatten(-1, (config.num_heads, 3, config.head_size))
        query, key, value = heads.unbind(-2)  # [B, T, heads, D] each
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(query, config), rotate(key, config)) * config.head_size**-0.5
        # The lowest number rather than -inf: a query in front of all that it may see has to stay a number.
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return self._linear(f"{name}.dense", attended.flatten(2))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + self._config.layer_norm_eps).sqrt()
        return normed * self._tensors[f"{name}.weight"] + self._tensors[f"{name}.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"]


def rotate(x: Tensor, config: DecoderConfig) -> Tensor:
    """Rotate x [B, T, heads, D] at positions 0..T-1: the first `rotary_dims` dimensions, paired in two halves."""
    half = config.rotary_dims // 2
    frequencies = config.rotary_base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angles = (positions[:, None] * frequencies)[:, None]  # [T, 1, half]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
