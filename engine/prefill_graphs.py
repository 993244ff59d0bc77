"""CUDA graphs of small prefills, one for each bucket of positions.

Such a prefill is over on the device before the host has launched it: a layer takes half a dozen launches of 40 to 70 us
each. A graph is one.
"""

from collections.abc import Callable
from functools import partial

import torch

from engine.batch_tables import BatchTables
from engine.graph_pool import GraphPool
from engine.prefill_layout import PrefillLayout, padding_table
from engine.prefill_step import PrefillStep
from engine.staging import Staging

GRAPH_POSITIONS = 2048
"""At most. On more than that, a large model's device works for longer than the host launches."""
BUCKET = 128
"""Positions between one graph and the next: a tile of the matrix products, for which a part of one costs as much."""
GRAPH_COLUMNS = 32
"""Of the table of chunks, padding included: for each, attention has a program a head that finds nothing to do."""


def largest_graph(max_step_positions: int) -> int:
    """Positions of the largest graph, where a step has so many at most."""
    return min(GRAPH_POSITIONS, max_step_positions)


class PrefillGraphs:
    """Replays the prefill step. Blocks and table lie where all of the graphs read them."""

    def __init__(
        self, step: PrefillStep, tables: BatchTables, staging: Staging, pool: GraphPool, max_step_positions: int
    ) -> None:
        self._step = step
        self._staging = staging
        self._pool = pool
        self._most = largest_graph(max_step_positions)
        self._blocks = torch.zeros(self._most, tables.block_length, dtype=torch.int32, device=tables.device)
        self._table = torch.from_numpy(padding_table(GRAPH_COLUMNS, tables.padding_row)).to(tables.device)
        self._replays: dict[int, Callable[[], None]] = {}
        """By bucket."""

    def capture_all(self) -> bool:
        """Capture every bucket's graph, the largest first: the others find its memory in the pool. Always True.

        To be called before the first run: what is computed meanwhile is padding. A bucket that memory does not suffice
        for stays without a graph.
        """
        for bucket in sorted({self._bucket(positions) for positions in range(1, self._most + 1)}, reverse=True):
            self._replays[bucket] = self._pool.capture(partial(self._step.run, self._blocks[:bucket], self._table))
        return True

    def run(self, layout: PrefillLayout) -> bool:
        """As `PrefillStep.run`, for arrays on the host. False, and nothing done, where no graph holds them."""
        positions, columns = len(layout.blocks), layout.table.shape[1]
        if positions > self._most or columns > GRAPH_COLUMNS:
            return False
        replay = self._replays.get(self._bucket(positions))
        if replay is None:
            return False
        # Behind them lie blocks of a prefill before this one: as good as any.
        self._staging.fill(self._blocks[:positions], layout.blocks)
        self._staging.fill(self._table, layout.widened(GRAPH_COLUMNS))
        replay()
        return True

    def _bucket(self, positions: int) -> int:
        return min(-(-positions // BUCKET) * BUCKET, self._most)
