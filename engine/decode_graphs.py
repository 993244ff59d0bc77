"""CUDA graphs of the decode step, one for each bucket of rows; and as many of the adjusted step, once it is needed."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from engine.batch_tables import BatchTables
from engine.decode_step import DecodeStep, Written
from engine.graph_pool import GraphPool
from engine.row_table import Rows
from engine.staging import Staging


def bucket_of(rows: int, max_rows: int) -> int:
    """Rows that a graph for `rows` rows holds: eight, ten, twelve, fourteen, sixteen, and so on, four steps a doubling.

    A row of padding costs what a row costs, and a graph costs memory and time at its first use: less than a quarter of
    a batch is padding, and 4096 rows need 44 graphs at the most.
    """
    step = max(1, (1 << (rows - 1).bit_length()) // 8)
    return min(-(-rows // step) * step, max_rows)


class DecodeGraphs:
    """Replays the decode step. Its rows lie where all of the graphs read them."""

    def __init__(self, step: DecodeStep, tables: BatchTables, staging: Staging, pool: GraphPool, max_rows: int) -> None:
        self._step = step
        self._tables = tables
        self._staging = staging
        self._pool = pool
        self._max_rows = max_rows
        self._row_index = torch.full((max_rows,), tables.padding_row, dtype=torch.int32, device=tables.device)
        self._replays: dict[tuple[bool, int], Callable[[], Written]] = {}
        """By whether the step is adjusted, and by bucket."""

    def capture_all(self) -> bool:
        """Capture every bucket's plain graph, the largest first: the others find its memory in the pool. Always True.

        A graph that memory does not suffice for is captured when it is needed.
        """
        for bucket in sorted({bucket_of(rows, self._max_rows) for rows in range(1, self._max_rows + 1)}, reverse=True):
            if (False, bucket) not in self._replays:
                self._replays[False, bucket] = self._capture(bucket)
        return True

    def forget_adjusted(self) -> None:
        """Drop the graphs of the adjusted step: they are of tables that are used no more."""
        if self._tables.device.type == "cuda":
            torch.cuda.synchronize(self._tables.device)
        self._replays = {key: replay for key, replay in self._replays.items() if not key[0]}

    def run(self, rows: Rows, *, adjusted: bool = False) -> Written:
        """As `DecodeStep.run`, for rows [R] on the host; what is returned is overwritten by the next run.

        Where a capture runs out of memory, no graph is kept and no row has changed.
        """
        bucket = bucket_of(len(rows), self._max_rows)
        replay = self._replays.get((adjusted, bucket))
        if replay is None:
            replay = self._replays[adjusted, bucket] = self._capture(bucket, adjusted=adjusted)
        padded = np.full(bucket, self._tables.padding_row, np.int32)
        padded[: len(rows)] = rows
        self._staging.fill(self._row_index[:bucket], padded)
        return replay().first(len(rows))

    def _capture(self, bucket: int, *, adjusted: bool = False) -> Callable[[], Written]:
        # Only the padding row is written by it, whose rows were those of the last run.
        self._row_index.fill_(self._tables.padding_row)
        return self._pool.capture(partial(self._step.run, self._row_index[:bucket], adjusted=adjusted))
