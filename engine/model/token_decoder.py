"""The token decoder: writes a block, token by token, from its context embedding (paper section 2.3)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import BlockTransformerConfig
from engine.model.few_positions import FewPositions
from engine.model.layers import LayerStack, Linear
from engine.model.token_table import first_layer_table
from engine.model.writer import Choose, Scratch
from kernels.dispatch import Kernels
from kernels.late_norm import LateNorm
from kernels.rotary import rotary_table


class TokenDecoder:
    """A small causal transformer that sees a context embedding and the tokens of one block, nothing else."""

    def __init__(self, config: BlockTransformerConfig, tensors: Mapping[str, Tensor], kernels: Kernels) -> None:
        decoder = config.token_decoder
        self._config = config
        self._kernels = kernels
        self._stack = LayerStack(decoder, tensors, "token_decoder.gpt_neox", kernels)
        self._few_positions = FewPositions(self._stack) if kernels.late_norm_positions else None
        self._table = tensors["token_decoder.gpt_neox.embed_in.weight"]
        """By token: its embedding [h] or, if that alone enters the first layer, its entry of a `token_table`."""
        if decoder.strategy == "prefix" and config.block_length > 1:
            self._table = first_layer_table(tensors, "token_decoder.gpt_neox", decoder.layer_norm_eps)
        self._expansion = Linear.of(tensors, "token_decoder.expansion_layer")
        self._head = Linear.of(tensors, "token_decoder.embed_out")
        self._scale = decoder.head_size**-0.5
        self._rotary = rotary_table(
            config.token_decoder_positions, decoder.rotary_dims, decoder.rotary_base, self._table.device
        )

    def new_scratch(self, rows: int) -> Scratch:
        """A scratch cache for `rows` rows."""
        decoder = self._config.token_decoder
        shape = (decoder.num_layers, rows, decoder.num_heads, self._config.token_decoder_positions, decoder.head_size)
        return Scratch(self._table.new_zeros(shape), self._table.new_zeros(shape))

    def write_block(self, context: Tensor, scratch: Scratch, choose: Choose) -> Tensor:
        """Write one block for each context embedding of `context` [R, H]; the scratch has R rows at least.

        `choose` takes the logits of each place in turn, and what it returns is fed back. Returns the tokens [R, L].
        """
        expanded = self._stack.linear(context, self._expansion).view(
            context.shape[0], self._config.expanded_vectors, -1
        )
        write = self._write_summed if self._config.token_decoder.strategy == "summation" else self._write_behind_prefix
        return torch.stack(write(expanded, scratch, choose), dim=1)

    def _write_behind_prefix(self, expanded: Tensor, scratch: Scratch, choose: Choose) -> list[Tensor]:
        """The expanded context [R, prefix, h] goes in front of the tokens; its last position predicts the first."""
        rows, prefix_length, width = expanded.shape
        hidden = self._positions(expanded.reshape(-1, width), prefix_length, 0, scratch)
        tokens = [choose(self._logits(hidden.view(rows, prefix_length, width)[:, -1]), 0)]
        for place in range(1, self._config.block_length):
            entries = F.embedding(tokens[-1], self._table)
            hidden = self._positions(entries, 1, prefix_length + place - 1, scratch)
            tokens.append(choose(self._logits(hidden), place))
        return tokens

    def _write_summed(self, expanded: Tensor, scratch: Scratch, choose: Choose) -> list[Tensor]:
        """Place j takes its vector of the expanded context [R, L, h] plus the token before, at first end-of-text."""
        tokens: list[Tensor] = []
        for place in range(self._config.block_length):
            before = F.embedding(tokens[-1], self._table) if tokens else self._table[self._config.eos_token_id]
            hidden = self._positions(expanded[:, place] + before, 1, place, scratch)
            tokens.append(choose(self._logits(hidden), place))
        return tokens

    def _positions(self, x: Tensor, length: int, first_position: int, scratch: Scratch) -> Tensor:
        """Run each row's positions first_position.., `length` of them, S: what is behind the final norm [R * S, h].

        x: [R * S, h], or entries of the table; overwritten.
        """

        def between(layer: int, into: Tensor, inner: Tensor, norm: LateNorm | None = None) -> None:
            rows = len(into) // length
            self._kernels.local_attention_and_gelu(
                into.view(rows, length, -1),
                norm,
                first_position,
                self._rotary,
                scratch.keys[layer],
                scratch.values[layer],
                self._scale,
                inner.view(rows, length, -1),
            )

        if self._few_positions is not None and self._few_positions.suit(x):
            return self._few_positions.forward(x, between)
        return self._stack.forward(x, between)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._stack.linear(hidden, self._head)
