"""A decode step on the device: one block for each of a batch's rows. Reads and writes device tensors only."""

import torch
from torch import Tensor

from engine.batch_tables import BatchTables
from engine.kv_cache import KVCache
from engine.model.block_decoder import DecodeBatch
from engine.model.model import Model
from kernels.dispatch import Kernels


class DecodeStep:
    """Embed, block decoder, token decoder with sampling and feedback, and the bookkeeping of rows.

    Nothing in it waits for the device or depends on a value there, so a CUDA graph can hold it.
    """

    def __init__(self, model: Model, kernels: Kernels, cache: KVCache, tables: BatchTables, max_rows: int) -> None:
        self._model = model
        self._kernels = kernels
        self._cache = cache
        self._tables = tables
        self._scratch = model.new_scratch(max_rows)

    def run(self, row_index: Tensor) -> tuple[Tensor, Tensor]:
        """Write a block for each row of row_index [R] int32: tokens [R, L], and whether its logits were finite [R]."""
        tables, page_size = self._tables, self._cache.layout.page_size
        index = row_index.long()
        positions = tables.position[index]
        pages = tables.page_table[index, (positions // page_size).long()].long()
        batch = DecodeBatch(
            row_index=row_index,
            positions=positions,
            slots=pages * page_size + positions % page_size,
            page_table=tables.page_table,
        )
        context = self._model.decode(tables.last_block[index], batch, self._cache.keys, self._cache.values)
        tokens, finite = self._write_block(context, row_index)
        tables.advance(row_index, tokens)
        return tokens, finite

    def _write_block(self, context: Tensor, row_index: Tensor) -> tuple[Tensor, Tensor]:
        tables, index = self._tables, row_index.long()
        generated, forced_length = tables.generated[index], tables.forced_length[index]
        forced_tokens = tables.forced_tokens[index]
        finite = torch.ones_like(generated, dtype=torch.bool)

        def choose(logits: Tensor, place: int) -> Tensor:
            nonlocal finite
            generated_index = generated + (place - forced_length).clamp(min=0)
            chosen, row_finite = self._kernels.sample(logits, row_index, generated_index, tables.sampling)
            forced = forced_length > place
            finite = finite & (row_finite | forced)
            return torch.where(forced, forced_tokens[:, place], chosen)

        return self._model.write_block(context, self._scratch, choose), finite
