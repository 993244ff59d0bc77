"""CUDA graphs of the decode step, one for each bucket of rows; and as many of the adjusted step, once it is needed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch_tables import BatchTables
from engine.decode_step import DecodeStep, Written
from engine.row_table import Int32
from engine.staging import Staging

WARM_UP_RUNS = 2


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    row_index: Tensor
    written: Written


def bucket_of(rows: int, max_rows: int) -> int:
    """Rows that a graph for `rows` rows holds: eight, ten, twelve, fourteen, sixteen, and so on, four steps a doubling.

    A row of padding costs what a row costs, and a graph costs memory and time at its first use: less than a quarter of
    a batch is padding, and 4096 rows need 44 graphs at the most.
    """
    step = max(1, (1 << (rows - 1).bit_length()) // 8)
    return min(-(-rows // step) * step, max_rows)


class DecodeGraphs:
    """Replays the decode step; every graph uses one pool of memory, since only one runs at a time."""

    def __init__(self, step: DecodeStep, tables: BatchTables, staging: Staging, max_rows: int) -> None:
        self._step = step
        self._tables = tables
        self._staging = staging
        self._max_rows = max_rows
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: cuBLAS keeps a workspace for each stream that it has seen.
        self._warm_up_stream = torch.cuda.Stream()
        self._captured: dict[tuple[bool, int], _Captured] = {}
        """By whether the step is adjusted, and by bucket."""

    def capture_all(self) -> bool:
        """Capture every bucket's plain graph, the largest first: the others find its memory in the pool. Always True.

        A graph that memory does not suffice for is captured when it is needed.
        """
        for bucket in sorted({bucket_of(rows, self._max_rows) for rows in range(1, self._max_rows + 1)}, reverse=True):
            if (False, bucket) not in self._captured:
                self._captured[False, bucket] = self._capture(bucket)
        return True

    def forget_adjusted(self) -> None:
        """Drop the graphs of the adjusted step: they are of tables that are used no more."""
        torch.cuda.synchronize(self._tables.device)
        self._captured = {key: captured for key, captured in self._captured.items() if not key[0]}

    def run(self, rows: Int32, *, adjusted: bool = False) -> Written:
        """As `DecodeStep.run`, for rows [R] on the host; what is returned is overwritten by the next run.

        Where a capture runs out of memory, no graph is kept and no row has changed.
        """
        bucket = bucket_of(len(rows), self._max_rows)
        captured = self._captured.get((adjusted, bucket))
        if captured is None:
            captured = self._captured[adjusted, bucket] = self._capture(bucket, adjusted=adjusted)
        padded = np.full(bucket, self._tables.padding_row, np.int32)
        padded[: len(rows)] = rows
        captured.row_index.copy_(self._staging.upload(padded, np.int32))
        captured.graph.replay()
        return captured.written.first(len(rows))

    def _capture(self, bucket: int, *, adjusted: bool = False) -> _Captured:
        # Only the padding row is written while warming up (which compiles kernels) and while capturing.
        row_index = torch.full((bucket,), self._tables.padding_row, dtype=torch.int32, device=self._tables.device)
        stream = self._warm_up_stream
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    self._step.run(row_index, adjusted=adjusted)
        finally:
            # Also after running out of memory: what was launched by then writes to the scratch cache all the same.
            torch.cuda.current_stream().wait_stream(stream)
        if not self._captured:
            # A pool ends with the last graph in it: after a capture that failed, the one before may be gone.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The outer context leads back to this stream: where ending a broken capture fails too, torch's own does not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
            written = self._step.run(row_index, adjusted=adjusted)
        return _Captured(graph, row_index, written)
