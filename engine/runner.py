"""Runs one step on the device: prompt chunks first, then one block for every decoding row.

Where memory runs out, the step is tried again in smaller parts; only what fails by itself is given up.
"""

import logging
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch_tables import BatchTables
from engine.decode_graphs import DecodeGraphs
from engine.decode_limit import DecodeLimit
from engine.decode_step import DecodeStep, Written
from engine.out_of_memory import attempt
from engine.prefill_graphs import PrefillGraphs
from engine.prefill_layout import ALIGNMENT, PrefillLayout, padding_table
from engine.prefill_step import PrefillStep
from engine.row_table import Flags, Int32, Rows
from engine.sequence import Sequence
from engine.staging import Staging, on_the_way_here
from engine.step_plan import BlockLogprobs, PrefillChunk, StepPlan

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class StepTokens:
    """What a step wrote: tokens [rows, L] and, per row, whether its logits were finite. On the host.

    The tokens of a row whose sequence failed, here or in the step before, mean nothing.
    """

    tokens: Int32
    finite: Flags
    failed: Collection[Sequence]
    """Sequences that the device had not the memory for; they cannot go on."""
    logprobs: BlockLogprobs | None
    """Of the tokens, where the step was an adjusted one."""


class StepInFlight:
    """A step that was launched. `wait` gives its tokens; until then the host is free."""

    def __init__(self, plan: StepPlan, block_length: int) -> None:
        """`plan`: what the step was to do."""
        self.failed: set[Sequence] = set()
        """Known at once, without waiting for the device."""
        self._shape = (len(plan.decode), block_length)
        self._parts: list[tuple[NDArray[np.intp], list[Tensor]]] = []
        self._arrived: torch.cuda.Event | None = None

    def add(self, places: NDArray[np.intp], written: Written) -> None:
        """Take what the rows at these places of the plan wrote, on the device."""
        tensors = [written.tokens, written.finite, *(written.logprobs or ())]
        if written.tokens.device.type == "cuda":
            # Into memory of this step's own: a graph's outputs are overwritten by the next run.
            tensors = on_the_way_here(tensors)
            self._arrived = self._arrived or torch.cuda.Event()
            self._arrived.record()
        self._parts.append((places, tensors))

    def wait(self) -> StepTokens:
        """The tokens, once the device has written them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if len(self._parts) == 1 and len(self._parts[0][0]) == self._shape[0]:
            # All rows at once, as nearly always.
            all_tokens, all_finite, *all_told = (one.numpy() for one in self._parts[0][1])
            return StepTokens(all_tokens, all_finite, self.failed, BlockLogprobs(*all_told) if all_told else None)
        tokens, finite = np.zeros(self._shape, np.int32), np.ones(self._shape[0], bool)
        logprobs: BlockLogprobs | None = None
        for places, (part, part_finite, *told) in self._parts:
            tokens[places] = part.numpy()
            finite[places] = part_finite.numpy()
            if told:
                logprobs = logprobs or BlockLogprobs.of_shape(self._shape)
                for whole, one in zip(logprobs, told, strict=True):
                    whole[places] = one.numpy()
        return StepTokens(tokens, finite, self.failed, logprobs)


@dataclass(frozen=True)
class StepGraphs:
    """CUDA graphs of a step's two parts."""

    prefill: PrefillGraphs
    decode: DecodeGraphs


class Runner:
    """Owns the device side of a batch: its tables, and the steps over them."""

    def __init__(
        self,
        *,
        prefill: PrefillStep,
        decode: DecodeStep,
        graphs: StepGraphs | None,
        tables: BatchTables,
        staging: Staging,
    ) -> None:
        """`graphs` None runs the steps' operations one by one."""
        self._prefill = prefill
        self._decode = decode
        self._graphs = graphs
        self._tables = tables
        self._staging = staging
        self._limit = DecodeLimit(tables.max_rows)

    @torch.inference_mode()
    def rehearse(self, positions: int, rows: int) -> None:
        """Compute a prefill of so many positions and a decode step of so many rows, all of them padding.

        What is compiled at first use is compiled then. No row changes. Raises what running out of memory raises.
        """
        upload, padding_row = self._staging.upload, self._tables.padding_row
        with self._staging.step():
            if positions:
                blocks = upload(np.zeros((positions, self._tables.block_length)), np.int32)
                self._prefill.run(blocks, upload(padding_table(ALIGNMENT, padding_row), np.int32))
            if rows:
                self._decode.run(upload([padding_row] * rows, np.int32))

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Capture every bucket's graphs.

        Where memory is too short, those of decodes are captured when they are needed, and prefills do without.
        """
        if self._graphs is None:
            return
        for capture_all in (self._graphs.decode.capture_all, self._graphs.prefill.capture_all):
            if not self._attempt(capture_all):
                log.warning("the device ran out of memory for graphs of its steps: lower kv_bytes or max_rows")

    @torch.inference_mode()
    def launch(self, plan: StepPlan, given_up: Collection[Sequence] = ()) -> StepInFlight:
        """Queue the step that `plan` describes. On CUDA this does not wait for the device; on the CPU it computes.

        `given_up`: sequences that failed in a step which is not committed yet; nothing is done for them.
        """
        step = StepInFlight(plan, self._tables.block_length)
        with self._staging.step():
            if self._attempt(partial(self._make_room, plan.bound)) is None:
                step.failed.update(sequence for sequence in plan.bound if sequence.request.params.adjusts)
            self._tables.bind([sequence for sequence in plan.bound if sequence not in step.failed])
            self._tables.set_pages(plan.page_entries)
            chunks = plan.prefill
            if given_up or step.failed:
                chunks = [c for c in chunks if c.sequence not in given_up and c.sequence not in step.failed]
            self._prefill_chunks(chunks, step)
            places = np.arange(len(plan.decode))
            if given_up or step.failed:
                places = places[[s not in given_up and s not in step.failed for s in plan.decode]]
            self._decode_rows(plan, places, step)
        if step.failed:
            ids = sorted(sequence.request.request_id for sequence in step.failed)
            log.warning("the device ran out of memory; requests fail", extra={"step": plan.number, "requests": ids})
        return step

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Do it; None where memory ran out. Work that can be attempted changes nothing that a second run would miss."""
        return attempt(work, self._tables.device)

    def _prefill_chunks(self, chunks: Seq[PrefillChunk], step: StepInFlight) -> None:
        """Run the chunks at once, or, where memory does not suffice for that, each by itself."""
        if not chunks or self._attempt(partial(self._run_chunks, chunks)):
            return
        for chunk in chunks:
            if not self._attempt(partial(self._run_chunks, [chunk])):
                step.failed.add(chunk.sequence)

    def _decode_rows(self, plan: StepPlan, places: NDArray[np.intp], step: StepInFlight) -> None:
        """Decode the rows at these places of the plan at once, or in as small parts as memory demands."""
        start = 0
        while start < len(places):
            part = places[start : start + self._limit.rows]
            written = self._attempt(partial(self._run_rows, plan.rows[part], adjusted=plan.adjusted))
            if written is not None:
                step.add(part, written)
            else:
                self._limit.ran_out(len(part))
                if len(part) > 1:
                    log.warning(
                        "the device ran out of memory for %d rows at once: at most %d for now",
                        len(part),
                        self._limit.rows,
                    )
                    continue
                step.failed.add(plan.decode[part[0]])
            start += len(part)
        self._limit.step_done()

    def _make_room(self, bound: Seq[Sequence]) -> bool:
        """Always True, for `_attempt`."""
        if self._tables.adjustments.make_room(bound) and self._graphs is not None:
            self._graphs.decode.forget_adjusted()
        return True

    def _run_rows(self, rows: Rows, *, adjusted: bool) -> Written:
        if self._graphs is not None:
            return self._graphs.decode.run(rows, adjusted=adjusted)
        return self._decode.run(self._staging.upload(rows, np.int32), adjusted=adjusted)

    def _run_chunks(self, chunks: Seq[PrefillChunk]) -> bool:
        """Always True, for `_attempt`."""
        layout = PrefillLayout.of(chunks, self._tables.padding_row)
        if self._graphs is None or not self._graphs.prefill.run(layout):
            upload = self._staging.upload
            self._prefill.run(upload(layout.blocks, np.int32), upload(layout.table, np.int32))
        return True
