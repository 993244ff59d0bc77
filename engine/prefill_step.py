"""A prefill on the device: keys and values of prompt chunks, into their rows' pages. Reads device tensors only."""

import torch
from torch import Tensor

from engine.batch_tables import BatchTables
from engine.kv_cache import KVCache
from engine.model.block_decoder import PrefillBatch
from engine.model.model import Model


class PrefillStep:
    """From chunks to where each of their entries belongs, and through the block decoder.

    On CUDA nothing in it waits for the device or depends on a value there, so a graph can hold it.
    """

    def __init__(self, model: Model, cache: KVCache, tables: BatchTables) -> None:
        self._model = model
        self._cache = cache
        self._tables = tables

    def run(self, blocks: Tensor, table: Tensor) -> None:
        """Store keys and values of blocks [N, L] int32; `table` [3, C] int32 is that of a `PrefillLayout`.

        Entries of `blocks` behind the last chunk's are padding. They write to the null page, and nobody sees them.
        """
        batch = prefill_batch(len(blocks), table, self._tables.page_table, self._cache.layout.page_size)
        self._model.prefill(blocks, batch, self._cache.keys, self._cache.values)


def prefill_batch(length: int, table: Tensor, page_table: Tensor, page_size: int) -> PrefillBatch:
    """Where each of `length` entries belongs; `table` [3, C] int32 is that of a `PrefillLayout`, over `page_table`.

    Entries behind the last chunk's are padding, in position 0 of the table's last row.
    """
    rows, firsts, offsets = table.unbind(0)
    entries = torch.arange(length, dtype=torch.int32, device=table.device)
    chunk = torch.searchsorted(offsets, entries, right=True) - 1
    positions = firsts[chunk] + entries - offsets[chunk]
    # The padding row has but null pages; position 0 is one that every model has.
    positions.masked_fill_(entries >= offsets[-1], 0)
    pages = page_table[rows[chunk].long(), (positions // page_size).long()].long()
    return PrefillBatch(
        positions=positions,
        slots=pages * page_size + positions % page_size,
        page_table=page_table,
        chunk_rows=rows[:-1],
        chunk_offsets=offsets,
        chunk_positions=firsts[:-1],
    )
