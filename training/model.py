"""A differentiable Block Transformer (Ho et al., 2024, arXiv 2406.02657): lookup embedder, prefix token decoder.

The layers are GPT-NeoX layers; names in the state dict are the public reference's. Shapes: B sequences of N blocks of
L tokens, H block decoder width, h token decoder width, R prefix length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of one GPT-NeoX decoder."""

    num_layers: int = 6
    hidden_size: int = 256
    num_heads: int = 8
    intermediate_size: int = 1024
    rotary_pct: float = 0.25
    rotary_base: int = 10000
    layer_norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """How many dimensions at a head's start are rotated."""
        return int(self.head_size * self.rotary_pct)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the whole model; ``max_length`` is in tokens. The embedder concatenates ``block_length`` vectors."""

    vocab_size: int = 4096
    block_length: int = 4
    max_length: int = 2048
    embedder_size: int = 64
    prefix_length: int = 2
    block_decoder: DecoderConfig = field(default_factory=DecoderConfig)
    token_decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        if self.embedder_size * self.block_length != self.block_decoder.hidden_size:
            raise ValueError("embedder_size * block_length must equal the block decoder's hidden_size")

    def to_json(self, dtype: str) -> dict[str, Any]:
        """The content of ``config.json`` for weights stored as ``dtype``."""
        return {
            "model_type": "block_transformer",
            "vocab_size": self.vocab_size,
            "block_length": self.block_length,
            "max_length": self.max_length,
            "prompt_alignment": "left_pad",
            "eos_token_id": 0,
            "dtype": dtype,
            "embedder": {
                "type": "lookup",
                "hidden_size": self.embedder_size,
                "projection": "concat",
                "pad_token_id": 0,
            },
            "block_decoder": asdict(self.block_decoder),
            "token_decoder": asdict(self.token_decoder) | {"strategy": "prefix", "prefix_length": self.prefix_length},
        }

    @staticmethod
    def from_json(config: dict[str, Any]) -> ModelConfig:
        """Read what ``to_json`` made."""
        token_decoder = {k: v for k, v in config["token_decoder"].items() if k not in ("strategy", "prefix_length")}
        return ModelConfig(
            vocab_size=config["vocab_size"],
            block_length=config["block_length"],
            max_length=config["max_length"],
            embedder_size=config["embedder"]["hidden_size"],
            prefix_length=config["token_decoder"]["prefix_length"],
            block_decoder=DecoderConfig(**config["block_decoder"]),
            token_decoder=DecoderConfig(**token_decoder),
        )


def rotary_table(config: DecoderConfig, length: int, device: torch.device) -> Tensor:
    """Cosines and sines, fp32 ``[2, length, 1, rotary_size]``, frequencies ``base^(-2i / rotary_size)``."""
    exponents = torch.arange(0, config.rotary_size, 2, device=device, dtype=torch.float32) / config.rotary_size
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * config.rotary_base**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first dimensions of ``x`` ``[..., length, heads, head_size]`` (halves paired, as in GPT-NeoX)."""
    size = table.shape[-1]
    head, rest = x[..., :size].float(), x[..., size:]
    a, b = head.chunk(2, dim=-1)
    turned = head * table[0] + torch.cat([-b, a], dim=-1) * table[1]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


class Attention(nn.Module):
    """Multi-head attention; ``query_key_value``'s rows are laid out per head as [q | k | v]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, short: bool) -> Tensor:
        """``x`` ``[sequences, length, width]``; ``mask`` True where a query sees a key (None: causal)."""
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        q, k = rotate(q, table), rotate(k, table)
        attend = attend_short if short else attend_long
        return self.dense(attend(q, k, v, mask).flatten(-2))  # type: ignore[no-any-return]


def attend_long(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over long sequences; all ``[sequences, length, heads, head_size]``, mask broadcast over heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same for a handful of positions, as sums of products.

    A compiler fuses these into a few passes over memory; attention kernels pad each sequence to their tile of 64 or
    more. Mask ``[sequences, 1, length, length]``.
    """
    assert mask is not None
    scores = (q[:, :, None] * k[:, None]).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask[:, 0, :, :, None], -torch.inf)
    weights: Tensor = scores.softmax(dim=2).to(v.dtype)
    return torch.sum(weights[..., None] * v[:, None], dim=2)


class MLP(nn.Module):
    """Two linear maps with the exact (erf) GELU between them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same shape."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Parallel residual: ``x + attention(LN1 x) + mlp(LN2 x)``."""

    def __init__(self, config: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, short: bool) -> Tensor:
        """``[sequences, length, width]`` to the same shape."""
        attended = self.attention(self.input_layernorm(x), table, mask, short)
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(attended + fed, self.dropout, self.training)


class GPTNeoX(nn.Module):
    """A stack of layers and the final norm; ``embed_in`` only where there is a token table."""

    def __init__(self, config: DecoderConfig, dropout: float, vocab_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        if vocab_size is not None:
            self.embed_in = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None, short: bool) -> Tensor:
        """``x`` ``[sequences, length, width]`` at positions ``0 .. length - 1``."""
        table = rotary_table(self.config, x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, table, mask, short)
        return self.final_layer_norm(x)  # type: ignore[no-any-return]


class Embedder(nn.Module):
    """A block's vector is the concatenation of its tokens' vectors; pads (id 0) count like any token."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, size)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[B, N, L]`` to ``[B, N, L * size]``."""
        return self.embeddings(ids).flatten(-2)  # type: ignore[no-any-return]


class BlockDecoder(nn.Module):
    """Causal transformer over block vectors; its output i conditions block i + 1."""

    def __init__(self, config: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.gpt_neox = GPTNeoX(config, dropout)

    def forward(self, x: Tensor, block_mask: Tensor | None = None) -> Tensor:
        """``[B, N, H]`` to the same shape; ``block_mask`` ``[B, N]`` is False at blocks that are all padding."""
        mask = None
        if block_mask is not None:
            length = x.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            own = torch.eye(length, dtype=torch.bool, device=x.device)
            # A masked block sees itself, so that no row of the softmax is empty; nothing reads its output.
            mask = (causal & block_mask[:, None, None]) | own
        return self.gpt_neox(x, mask, short=False)  # type: ignore[no-any-return]


class TokenDecoder(nn.Module):
    """Writes a block from its context: R prefix vectors, then the block's own tokens, causal."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        width = config.token_decoder.hidden_size
        self.prefix_length = config.prefix_length
        self.gpt_neox = GPTNeoX(config.token_decoder, dropout, config.vocab_size)
        self.embed_out = nn.Linear(width, config.vocab_size, bias=False)
        self.expansion_layer = nn.Conv1d(config.block_decoder.hidden_size, config.prefix_length * width, 1)

    def forward(self, contexts: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[M, L, V]`` of M blocks ``ids`` ``[M, L]`` given ``contexts`` ``[M, H]``; ``mask`` False at pads."""
        # A convolution of kernel 1 over one position is this product.
        prefix = F.linear(contexts, self.expansion_layer.weight.squeeze(-1), self.expansion_layer.bias)
        prefix = prefix.unflatten(-1, (self.prefix_length, -1))
        x = torch.cat([prefix, self.gpt_neox.embed_in(ids[:, :-1]).to(prefix.dtype)], dim=1)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        keys = F.pad(mask[:, :-1], (self.prefix_length, 0), value=True)
        x = self.gpt_neox(x, causal & keys[:, None, None], short=True)
        return self.embed_out(x[:, self.prefix_length - 1 :])  # type: ignore[no-any-return]


class BlockTransformer(nn.Module):
    """The whole model. ``dropout`` acts on every layer's output while training."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.embedder = Embedder(config.vocab_size, config.embedder_size)
        self.block_decoder = BlockDecoder(config.block_decoder, dropout)
        self.token_decoder = TokenDecoder(config, dropout)

    def contexts(self, ids: Tensor, block_mask: Tensor | None = None) -> Tensor:
        """Context embeddings ``[B, N, H]`` of ids ``[B, N, L]``; number i conditions block i + 1."""
        x = F.dropout(self.embedder(ids), self.dropout, self.training)
        return self.block_decoder(x, block_mask)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, mask: Tensor, block_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, N - 1, L, V]`` of blocks 1 .. N-1; ``ids`` and ``mask`` (False at pads) ``[B, N, L]``."""
        contexts = self.contexts(ids, block_mask)[:, :-1]
        logits = self.token_decoder(contexts.flatten(0, 1), ids[:, 1:].flatten(0, 1), mask[:, 1:].flatten(0, 1))
        return logits.unflatten(0, (ids.shape[0], -1))  # type: ignore[no-any-return]

    def initialise(self, std: float = 0.02) -> None:
        """Normal weights, zero biases; matrices that write to the residual stream shrink with the depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
        for decoder in (self.block_decoder.gpt_neox, self.token_decoder.gpt_neox):
            for name, parameter in decoder.layers.named_parameters():
                if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                    nn.init.normal_(parameter, std=std / (2 * len(decoder.layers)) ** 0.5)


def split_padding(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """From blocks with pads as -1 to ``(ids, mask)``: pads become id 0 with mask False."""
    mask = blocks >= 0
    return blocks.long().clamp_min(0), mask


def training_loss(model: nn.Module, blocks: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats per token) of blocks 1 .. N-1 of ``[B, N, L]``, pads left out."""
    ids, mask = split_padding(blocks)
    logits = model(ids, mask)
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), ignore_index=-100)
