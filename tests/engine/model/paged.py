"""Drives the served model over a paged cache, the way the runner does, but with every table in plain view."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.block_decoder import DecodeBatch, PrefillBatch
from engine.model.model import Model

CPU = torch.device("cpu")
PAGE_SIZE = 8


def int32(values: Sequence[int]) -> Tensor:
    """A tensor of int32."""
    return torch.tensor(values, dtype=torch.int32)


class PagedRun:
    """Rows with shuffled pages in a cache that is full of NaN where nothing was written.

    Row r of the run sits in row `table_rows[r]` of the page table, so that no index is right by accident.
    """

    def __init__(
        self,
        model: Model,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        decoder = model.config.block_decoder
        max_pages = -(-model.config.max_positions // PAGE_SIZE)
        generator = torch.Generator().manual_seed(rows)
        self.model = model
        self._device = device
        self.table_rows = torch.randperm(rows + 3, generator=generator)[:rows].int()
        self.page_table = torch.zeros(rows + 3, max_pages, dtype=torch.int32)
        self._free_pages: list[int] = (1 + torch.randperm(rows * max_pages, generator=generator)).tolist()
        self.lengths = [0] * rows
        shape = (decoder.num_layers, rows * max_pages + 1, decoder.num_heads, PAGE_SIZE, decoder.head_size)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
        self.scratch = model.new_scratch(rows + 2)
        for tensor in (self.scratch.keys, self.scratch.values):
            tensor.fill_(torch.nan)

    def prefill(self, chunks: Sequence[tuple[int, int, Tensor]]) -> None:
        """Prefill chunks (row, first position, token ids [n, L]) in one pass."""
        if not chunks:
            return
        positions, slots, offsets = [], [], [0]
        for row, first, blocks in chunks:
            assert first == self.lengths[row]
            for position in range(first, first + len(blocks)):
                positions.append(position)
                slots.append(self._slot(row, position))
            offsets.append(len(positions))
            self.lengths[row] = first + len(blocks)
        batch = PrefillBatch(
            positions=int32(positions).to(self._device),
            slots=torch.tensor(slots).to(self._device),
            page_table=self.page_table.to(self._device),
            chunk_rows=self.table_rows[[row for row, _, _ in chunks]].to(self._device),
            chunk_offsets=int32(offsets).to(self._device),
            chunk_positions=int32([first for _, first, _ in chunks]).to(self._device),
        )
        token_ids = torch.cat([blocks for _, _, blocks in chunks]).to(self._device)
        self.model.prefill(token_ids, batch, self.keys, self.values)

    def decode(self, blocks: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """One more block, [R, L], for each of `rows` (None: all). Returns context embeddings [R, H]."""
        rows = range(len(self.lengths)) if rows is None else rows
        positions = [self.lengths[row] for row in rows]
        slots = torch.tensor([self._slot(row, position) for row, position in zip(rows, positions, strict=True)])
        batch = DecodeBatch(
            self.table_rows[list(rows)].to(self._device),
            int32(positions).to(self._device),
            slots.to(self._device),
            self.page_table.to(self._device),
        )
        for row in rows:
            self.lengths[row] += 1
        return self.model.decode(blocks.to(self._device), batch, self.keys, self.values)

    def forced_logits(self, context: Tensor, blocks: Tensor) -> Tensor:
        """Logits [R, L, V] of the block that follows `context` [R, H] when it is forced to be `blocks` [R, L]."""
        seen = []

        def choose(logits: Tensor, place: int) -> Tensor:
            seen.append(logits)
            return blocks[:, place].to(self._device)

        written = self.model.write_block(context, self.scratch, choose)
        assert torch.equal(written.cpu(), blocks)
        return torch.stack(seen, dim=1)

    def _slot(self, row: int, position: int) -> int:
        page, offset = divmod(position, PAGE_SIZE)
        table_row = int(self.table_rows[row])
        if not offset:
            self.page_table[table_row, page] = self._free_pages.pop()
        return int(self.page_table[table_row, page]) * PAGE_SIZE + offset
