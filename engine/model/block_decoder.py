"""The block decoder: a causal transformer over block embeddings, its keys and values in pages (paper section 2.2).

All the layers of a vanilla model are one, over blocks of one token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.config import ModelConfig
from engine.model.layers import Between, LayerStack
from kernels.dispatch import Kernels
from kernels.rotary import rotary_table


@dataclass(frozen=True)
class DecodeBatch:
    """One new position for each of R rows. slot = page * page_size + offset of the position in its page."""

    row_index: Tensor
    """[R] int32 into the page table."""
    positions: Tensor
    """[R] int32; the position attends to itself and all before it."""
    slots: Tensor
    """[R] int64."""
    page_table: Tensor
    """[rows, max_pages] int32."""


@dataclass(frozen=True)
class PrefillBatch:
    """Chunks of consecutive prompt positions, N in all, laid one behind the other; padding may stand behind them.

    Padding attends to nothing, and its outputs mean nothing; it has a position and a slot to write as every entry has.
    """

    positions: Tensor
    """[N] int32."""
    slots: Tensor
    """[N] int64."""
    page_table: Tensor
    """[rows, max_pages] int32."""
    chunk_rows: Tensor
    """[C] int32 into the page table."""
    chunk_offsets: Tensor
    """[C + 1] int32: chunk c is entries chunk_offsets[c]:chunk_offsets[c+1], of which there may be none."""
    chunk_positions: Tensor
    """[C] int32: the chunk's first position."""


Project = Callable[[int, Tensor], Tensor]
"""(layer, fused projection [N, 3 * H]) -> queries [N, heads, D]."""


class BlockDecoder:
    """Reads and writes a paged cache: `keys` and `values`, [layers, pages, heads, page_size, D] each."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], name: str, kernels: Kernels) -> None:
        """Weights are those that `tensors` holds under `name`, for example "block_decoder.gpt_neox"."""
        decoder = config.block_decoder
        self._kernels = kernels
        self._stack = LayerStack(decoder, tensors, name, kernels)
        self._scale = decoder.head_size**-0.5
        device = self._stack.final_norm.weight.device
        self._rotary = rotary_table(config.max_positions, decoder.rotary_dims, decoder.rotary_base, device)

    def decode(self, x: Tensor, batch: DecodeBatch, keys: Tensor, values: Tensor) -> Tensor:
        """Block embeddings x [R, H], one a row -> context embeddings [R, H]. Stores the positions' keys and values."""
        context_lengths = batch.positions + 1

        def attend(layer: int, qkv: Tensor, out: Tensor) -> None:
            query = self._kernels.rotary_paged_write(
                qkv, batch.positions, batch.slots, self._rotary, keys[layer], values[layer]
            )
            self._kernels.paged_decode_attention(
                query,
                keys[layer],
                values[layer],
                batch.page_table,
                batch.row_index,
                context_lengths,
                self._scale,
                out.view(query.shape),
            )

        return self._stack.forward(x, self._stack.gelu_behind(attend))

    def prefill(self, x: Tensor, batch: PrefillBatch, keys: Tensor, values: Tensor) -> None:
        """Store keys and values for the block embeddings x [N, H] of prompt chunks."""
        write, between = self._chunk_operations(batch, keys, values)
        self._stack.project_only(x, between, write)

    def contexts(self, x: Tensor, batch: PrefillBatch, keys: Tensor, values: Tensor) -> Tensor:
        """As `prefill`, with context embeddings [N, H] of all positions."""
        _write, between = self._chunk_operations(batch, keys, values)
        return self._stack.forward(x, between)

    def _chunk_operations(self, batch: PrefillBatch, keys: Tensor, values: Tensor) -> tuple[Project, Between]:
        """Of chunks: storing keys and values, which returns the query; and all that lies between two products."""

        def write(layer: int, qkv: Tensor) -> Tensor:
            return self._kernels.rotary_paged_write(
                qkv, batch.positions, batch.slots, self._rotary, keys[layer], values[layer]
            )

        def attend(layer: int, qkv: Tensor, out: Tensor) -> None:
            query = write(layer, qkv)
            self._kernels.paged_prefill_attention(
                query,
                keys[layer],
                values[layer],
                batch.page_table,
                batch.chunk_rows,
                batch.chunk_offsets,
                batch.chunk_positions,
                self._scale,
                out.view(query.shape),
            )

        return write, self._stack.gelu_behind(attend)
