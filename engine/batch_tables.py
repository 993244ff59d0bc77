"""Device tensors that describe the running rows, addressed by row.

A decode step reads `row_index` into these tables, so rows are never moved. Row `max_rows` is reserved for padding: its
page table is all null page and its position stays 0.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.adjustments import Adjustments
from engine.row_table import Int64
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
        # What a row gets is written at once where it can be: the host takes 30 us for a write, and a first token waits
        # for it. Lines begin at multiples of 16 bytes, as Triton's kernels are compiled for.
        aligned = -(-rows // 4) * 4
        self._numbers = zeros(8, aligned)[:, :rows]
        self._states = self._numbers[:3]
        self.position, self.generated, self.forced_length, top_k, suppress_until, *fractions = self._numbers
        temperature, top_p, min_p = (line.view(torch.float32) for line in fractions)
        top_p.fill_(1)
        self._blocks = zeros(2, aligned, block_length)[:, :rows]
        self.last_block, self.forced_tokens = self._blocks
        self.sampling = SamplingTables(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=zeros(rows, dtype=torch.int64),
            suppress_until=suppress_until,
            suppressed_ids=torch.full((rows, max_suppressed), -1, dtype=torch.int32, device=device),
        )
        self.adjustments = Adjustments(rows=rows, vocab_size=vocab_size, staging=staging)
        self.places = torch.arange(block_length, dtype=torch.int32, device=device)[:, None]
        """[L, 1]: of a block's tokens."""
        self._step = torch.tensor([[1], [block_length], [0]], dtype=torch.int32, device=device)

    def bind(self, sequences: Seq[Sequence]) -> None:
        """Write the state of sequences that got their rows. They decode first at the position of their last block."""
        if not sequences:
            return
        rows = self._upload([sequence.bound_row for sequence in sequences], np.int64)
        params = [sequence.request.params for sequence in sequences]
        numbers = (
            [sequence.prefill_end for sequence in sequences],
            [sequence.generated for sequence in sequences],
            [len(sequence.forced) for sequence in sequences],
            [p.top_k for p in params],
            [p.min_tokens for p in params],
        )
        fractions = (
            [p.temperature and max(p.temperature, LEAST_TEMPERATURE) for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        )
        bits = np.array(fractions, np.float32).view(np.int32)
        self._numbers[:, rows] = self._upload(np.concatenate((np.array(numbers, np.int32), bits)), np.int32)
        blocks = np.zeros((2, len(sequences), self.block_length), np.int32)
        for place, sequence in enumerate(sequences):
            blocks[0, place] = sequence.blocks[sequence.prefill_end]
            blocks[1, place, : len(sequence.forced)] = sequence.forced
        self._blocks[:, rows] = self._upload(blocks, np.int32)
        self.page_table.index_fill_(0, rows, 0)
        self.sampling.seed[rows] = self._upload([p.seed for p in params], np.int64)
        if any(p.min_tokens for p in params):
            self._suppress(sequences, rows)
        self.adjustments.bind(sequences)

    def _suppress(self, sequences: Seq[Sequence], rows: Tensor) -> None:
        """Rows that are to have no tokens at least have nothing suppressed, whatever ids are theirs."""
        ids = np.full((len(sequences), self._max_suppressed), -1, np.int32)
        for place, sequence in enumerate(sequences):
            own = self._suppressed_ids(sequence)
            ids[place, : len(own)] = own
        self.sampling.suppressed_ids[rows] = self._upload(ids, np.int32)

    def set_pages(self, entries: Int64) -> None:
        """Write page table entries [entries, 3]: row, index, page."""
        if len(entries):
            rows, indices, pages = self._upload(np.ascontiguousarray(entries.T), np.int64)
            self.page_table[rows, indices] = pages.int()

    def states(self, index: Tensor) -> Tensor:
        """Rows `index` [R] as they are: [3, R] int32, their `position`, `generated` and `forced_length`."""
        return self._states[:, index]

    def advance(self, index: Tensor, states: Tensor, tokens: Tensor) -> None:
        """After a decode step: rows `index` [R], which were in `states`, have written `tokens` [R, L].

        No host synchronisation. Everything is allocated before anything is written, so a step that runs out of memory
        can be run again.
        """
        last_block = tokens.to(torch.int32)
        # One block further; what was forced was not sampled, and nothing of the next block is.
        after = states + self._step
        after[1:] -= states[2]
        self.last_block[index] = last_block
        self._states[:, index] = after
        self.position[self.padding_row].zero_()

    def _suppressed_ids(self, sequence: Sequence) -> tuple[int, ...]:
        params = sequence.request.params
        if not params.min_tokens:
            return ()
        ids = params.stop_token_ids if params.ignore_eos else (self._eos_token_id, *params.stop_token_ids)
        return tuple(dict.fromkeys(ids))
