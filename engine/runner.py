"""Runs one step on the device: prompt chunks first, then one block for every decoding row."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch_tables import BatchTables
from engine.decode_step import DecodeStep
from engine.graphs import DecodeGraphs
from engine.kv_cache import KVCache
from engine.model.block_decoder import PrefillBatch
from engine.model.block_transformer import BlockTransformer
from engine.scheduler import PrefillChunk, StepPlan
from engine.staging import Staging


@dataclass(frozen=True)
class StepTokens:
    """What a step wrote: tokens [rows, L] and, per row, whether its logits were finite. On the host."""

    tokens: list[list[int]]
    finite: list[bool]


class StepInFlight:
    """A step that was launched. `wait` gives its tokens; until then the host is free."""

    def __init__(self, tokens: Tensor | None, finite: Tensor | None) -> None:
        """tokens [rows, L] and finite [rows] on the device, or None for a step that decodes nothing."""
        self._tokens, self._finite = tokens, finite
        self._arrived: torch.cuda.Event | None = None
        if tokens is not None and finite is not None and tokens.device.type == "cuda":
            # Into memory of this step's own: a graph's outputs are overwritten by the next step.
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._finite = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._finite.copy_(finite, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> StepTokens:
        """The tokens, once the device has written them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._tokens is None or self._finite is None:
            return StepTokens([], [])
        return StepTokens(self._tokens.tolist(), self._finite.tolist())


class Runner:
    """Owns the device side of a batch: tables, KV cache and scratch cache."""

    def __init__(
        self,
        *,
        model: BlockTransformer,
        decode: DecodeStep,
        graphs: DecodeGraphs | None,
        cache: KVCache,
        tables: BatchTables,
        staging: Staging,
    ) -> None:
        """`graphs` None runs the decode step's operations one by one."""
        self._model = model
        self._decode = decode
        self._graphs = graphs
        self._cache = cache
        self._tables = tables
        self._staging = staging
        self._block_length = model.config.block_length

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepInFlight:
        """Queue the step that `plan` describes. On CUDA this does not wait for the device; on the CPU it computes."""
        with self._staging.step():
            self._tables.bind(plan.bound)
            self._tables.set_pages(plan.page_entries)
            if plan.prefill:
                self._prefill(plan.prefill)
            if not plan.decode:
                return StepInFlight(None, None)
            rows = [sequence.bound_row for sequence in plan.decode]
            if self._graphs is not None:
                return StepInFlight(*self._graphs.run(rows))
            return StepInFlight(*self._decode.run(self._staging.upload(rows, np.int32)))

    def _prefill(self, chunks: Seq[PrefillChunk]) -> None:
        length, page_size = self._block_length, self._cache.layout.page_size
        token_ids, positions, slots = [], [], []
        for chunk in chunks:
            end = chunk.start + chunk.length
            where = np.arange(chunk.start, end)
            pages = np.asarray(chunk.sequence.pages, np.int64)[where // page_size]
            token_ids.append(np.asarray(chunk.sequence.tokens[chunk.start * length : end * length]))
            positions.append(where)
            slots.append(pages * page_size + where % page_size)
        lengths = [chunk.length for chunk in chunks]
        upload = self._staging.upload
        batch = PrefillBatch(
            positions=upload(np.concatenate(positions), np.int32),
            slots=upload(np.concatenate(slots), np.int64),
            page_table=self._tables.page_table,
            chunk_rows=upload([chunk.sequence.bound_row for chunk in chunks], np.int32),
            chunk_offsets=upload(np.concatenate([[0], np.cumsum(lengths)]), np.int32),
            chunk_positions=upload([chunk.start for chunk in chunks], np.int32),
        )
        tokens = upload(np.concatenate(token_ids), np.int32).view(-1, length)
        self._model.prefill(tokens, batch, self._cache.keys, self._cache.values)
