"""Device tensors that describe the running rows, addressed by row.

A decode step reads `row_index` into these tables, so rows are never moved. Row `max_rows` is reserved for padding: its
page table is all null page and its position stays 0.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.adjustments import Adjustments
from engine.sequence import Sequence
from engine.staging import Staging
from kernels.sampler import SamplingTables

LEAST_TEMPERATURE = 1e-20
"""Smaller ones do what it does, the likeliest token every time: logits divided by them are beyond single precision."""


class BatchTables:
    """State of every row on the device; `bind` and `set_pages` are the only writes from the host.

    position [rows]: the block decoder position of the row's next decode. last_block [rows, L]: the tokens it embeds
    there. generated [rows]: tokens sampled so far. forced_tokens [rows, L], forced_length [rows]: how the next block
    begins.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_pages: int,
        block_length: int,
        eos_token_id: int,
        max_suppressed: int,
        vocab_size: int,
        staging: Staging,
    ) -> None:
        rows = max_rows + 1
        self.device = device = staging.device
        self._upload = staging.upload
        self.max_rows = max_rows
        self.padding_row = max_rows
        self.block_length = block_length
        self._eos_token_id = eos_token_id
        self._max_suppressed = max_suppressed

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.page_table = zeros(rows, max_pages)
        self.position = zeros(rows)
        self.last_block = zeros(rows, block_length)
        self.generated = zeros(rows)
        self.forced_tokens = zeros(rows, block_length)
        self.forced_length = zeros(rows)
        self.sampling = SamplingTables(
            temperature=zeros(rows, dtype=torch.float32),
            top_k=zeros(rows),
            top_p=torch.ones(rows, dtype=torch.float32, device=device),
            min_p=zeros(rows, dtype=torch.float32),
            seed=zeros(rows, dtype=torch.int64),
            suppress_until=zeros(rows),
            suppressed_ids=torch.full((rows, max_suppressed), -1, dtype=torch.int32, device=device),
        )
        self.adjustments = Adjustments(rows=rows, vocab_size=vocab_size, staging=staging)

    def bind(self, sequences: Seq[Sequence]) -> None:
        """Write the state of sequences that got their rows. They decode first at the position of their last block."""
        if not sequences:
            return
        length = self.block_length
        rows = self._upload([sequence.bound_row for sequence in sequences], np.int64)
        forced = np.zeros((len(sequences), length), np.int32)
        suppressed = np.full((len(sequences), self._max_suppressed), -1, np.int32)
        for place, sequence in enumerate(sequences):
            forced[place, : len(sequence.forced)] = sequence.forced
            ids = self._suppressed_ids(sequence)
            suppressed[place, : len(ids)] = ids
        params = [sequence.request.params for sequence in sequences]
        self.position[rows] = self._upload([s.prefill_end for s in sequences], np.int32)
        self.last_block[rows] = self._upload(np.stack([s.blocks[s.prefill_end] for s in sequences]), np.int32)
        self.generated[rows] = self._upload([s.generated for s in sequences], np.int32)
        self.forced_tokens[rows] = self._upload(forced, np.int32)
        self.forced_length[rows] = self._upload([len(s.forced) for s in sequences], np.int32)
        self.page_table.index_fill_(0, rows, 0)
        sampling = self.sampling
        temperature = [p.temperature and max(p.temperature, LEAST_TEMPERATURE) for p in params]
        sampling.temperature[rows] = self._upload(temperature, np.float32)
        sampling.top_k[rows] = self._upload([p.top_k for p in params], np.int32)
        sampling.top_p[rows] = self._upload([p.top_p for p in params], np.float32)
        sampling.min_p[rows] = self._upload([p.min_p for p in params], np.float32)
        sampling.seed[rows] = self._upload([p.seed for p in params], np.int64)
        sampling.suppress_until[rows] = self._upload([p.min_tokens for p in params], np.int32)
        sampling.suppressed_ids[rows] = self._upload(suppressed, np.int32)
        self.adjustments.bind(sequences)

    def set_pages(self, entries: Seq[tuple[int, int, int]]) -> None:
        """Write page table entries (row, index, page)."""
        if entries:
            rows, indices, pages = np.array(entries, np.int64).T
            self.page_table[self._upload(rows, np.int64), self._upload(indices, np.int64)] = self._upload(
                pages, np.int32
            )

    def advance(self, row_index: Tensor, tokens: Tensor) -> None:
        """After a decode step: rows `row_index` [R] have written `tokens` [R, L]. No host synchronisation.

        Everything is allocated before anything is written, so a step that runs out of memory can be run again.
        """
        index = row_index.long()
        forced_length = self.forced_length[index]
        last_block = tokens.to(torch.int32)
        position = self.position[index] + 1
        generated = self.generated[index] + (self.block_length - forced_length)
        nothing_forced = torch.zeros_like(forced_length)
        self.last_block[index] = last_block
        self.position[index] = position
        self.generated[index] = generated
        self.forced_length[index] = nothing_forced
        self.position[self.padding_row].zero_()

    def _suppressed_ids(self, sequence: Sequence) -> tuple[int, ...]:
        params = sequence.request.params
        if not params.min_tokens:
            return ()
        ids = params.stop_token_ids if params.ignore_eos else (self._eos_token_id, *params.stop_token_ids)
        return tuple(dict.fromkeys(ids))
