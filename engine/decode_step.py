"""A decode step on the device: one block for each of a batch's rows. Reads and writes device tensors only."""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch_tables import BatchTables
from engine.kv_cache import KVCache
from engine.model.block_decoder import DecodeBatch
from engine.model.model import Model
from kernels.dispatch import Kernels
from kernels.logprobs import Logprobs


class Written(NamedTuple):
    """What a step wrote: tokens [R, L], whether their logits were finite [R], and logprobs [R, L, ...] if adjusted."""

    tokens: Tensor
    finite: Tensor
    logprobs: Logprobs | None

    def first(self, rows: int) -> "Written":
        """The same of the first rows alone."""
        told = self.logprobs and Logprobs(*(part[:rows] for part in self.logprobs))
        return Written(self.tokens[:rows], self.finite[:rows], told)


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

    def run(self, row_index: Tensor, *, adjusted: bool = False) -> Written:
        """Write a block for each row of row_index [R] int32.

        `adjusted` also does what only some rows ask for: bias, penalties, logprobs. Other rows get the same tokens.
        """
        tables, page_size = self._tables, self._cache.layout.page_size
        index = row_index.long()
        states = tables.states(index)
        positions = states[0]
        pages = tables.page_table[index, (positions // page_size).long()].long()
        batch = DecodeBatch(
            row_index=row_index,
            positions=positions,
            slots=pages * page_size + positions % page_size,
            page_table=tables.page_table,
        )
        context = self._model.decode(tables.last_block[index], batch, self._cache.keys, self._cache.values)
        block = _Block(self._kernels, tables, row_index, index, states, adjusted=adjusted)
        tokens = self._model.write_block(context, self._scratch, block.choose)
        # As in `advance`, what is allocated comes before what is written: a step may be run again.
        finite = block.finite()
        if not adjusted:
            tables.advance(index, states, tokens)
            return Written(tokens, finite, None)
        logprobs = Logprobs(*(torch.stack(parts, dim=1) for parts in zip(*block.logprobs, strict=True)))
        entries = tables.adjustments.entries(row_index, tokens, block.forced_length)
        tables.advance(index, states, tokens)
        tables.adjustments.count(entries)
        return Written(tokens, finite, logprobs)


class _Block:
    """The choice of a block's tokens for rows `row_index` [R] in `states`, one place after the other.

    What is known of all places is computed for all of them at once: of few rows, a launch costs as much as its work.
    """

    def __init__(
        self,
        kernels: Kernels,
        tables: BatchTables,
        row_index: Tensor,
        index: Tensor,
        states: Tensor,
        *,
        adjusted: bool,
    ) -> None:
        _position, generated, self.forced_length = states
        self._kernels = kernels
        self._tables = tables
        self._row_index = row_index
        self._forced_tokens = tables.forced_tokens[index]
        self._forced = tables.places < self.forced_length
        # Of places that are forced it means nothing.
        self._generated_index = tables.places + (generated - self.forced_length)
        self._finite: list[Tensor] = []
        self._wanted = tables.adjustments.wanted[index] if adjusted else None
        self._written = row_index.new_empty(len(row_index), 0)
        self.logprobs: list[Logprobs] = []

    def finite(self) -> Tensor:
        """Whether the logits were finite wherever a token was sampled: [R] bool."""
        fine: Tensor = torch.stack(self._finite) | self._forced
        return fine.all(dim=0)

    def choose(self, logits: Tensor, place: int) -> Tensor:
        """Sample, or force, the token at this place: logits [R, V] -> [R]."""
        scores = logits
        if self._wanted is not None:
            scores = self._kernels.adjust(logits, self._row_index, self._written, self._tables.adjustments.tables)
        chosen, finite = self._kernels.sample(
            scores, self._row_index, self._generated_index[place], self._tables.sampling
        )
        self._finite.append(finite)
        forced = self._forced[place]
        tokens = torch.where(forced, self._forced_tokens[:, place], chosen)
        if self._wanted is not None:
            self.logprobs.append(self._kernels.top_logprobs(logits, tokens, self._wanted))
            # A forced token is one of the prompt's, which are counted already.
            counted = tokens.where(~forced, -1)[:, None]
            self._written = torch.cat((self._written, counted), dim=1)
        return tokens
