"""Prefills of tests: by a step, and beside it by a model with every table in plain view."""

import random

import torch
from torch.testing import assert_close

from engine.batch_tables import BatchTables
from engine.config import ModelConfig
from engine.kv_cache import NULL_PAGE, KVCache, KVLayout
from engine.model.build import build_model
from engine.prefill_layout import PrefillLayout, padding_table
from engine.prefill_step import PrefillStep
from engine.staging import Staging
from kernels.dispatch import Kernels, torch_kernels
from tests.engine.model.paged import CPU, PAGE_SIZE, PagedRun
from tests.engine.model.test_model import VOCAB, lively_weights, random_ids

ROWS, BLOCKS = 5, 36
ROUNDING = 2e-5
"""Products of other numbers of rows sum in another order."""


class Prefills:
    """The same chunks by a model alone (`expected`), and by a step over a cache of its own, full of NaN."""

    def __init__(self, config: ModelConfig, device: torch.device = CPU, kernels: Kernels | None = None) -> None:
        """`kernels` are the step's; the other model has the torch twins."""
        weights = {name: tensor.to(device) for name, tensor in lively_weights(config).items()}
        model, twin = (build_model(config, weights, one) for one in (kernels or torch_kernels(), torch_kernels()))
        self.ids = random_ids(config, ROWS, BLOCKS)
        self.expected = PagedRun(twin, ROWS, device=device)
        keys, values = self.expected.keys.clone(), self.expected.values.clone()
        layout = KVLayout.of(config.block_decoder, PAGE_SIZE, keys.dtype)
        self.cache = KVCache(layout, keys, values)
        self.staging = Staging(device)
        self.tables = BatchTables(
            max_rows=len(self.expected.page_table),
            max_pages=self.expected.page_table.shape[1],
            block_length=config.block_length,
            eos_token_id=config.eos_token_id,
            max_suppressed=1,
            vocab_size=VOCAB,
            staging=self.staging,
        )
        self.step = PrefillStep(model, self.cache, self.tables)

    def layout(self, chunks: list[tuple[int, int, int]], padding: int = 0, columns: int = 1) -> PrefillLayout:
        """Chunks (row, first position, length), which `expected` has then, with so much padding behind them."""
        parts = [(row, first, self.ids[row, first : first + length]) for row, first, length in chunks]
        self.expected.prefill(parts)
        self.tables.page_table[:-1].copy_(self.expected.page_table)
        any_block = self.ids[0, :1]
        blocks = torch.cat([*(blocks for _, _, blocks in parts), any_block.expand(padding, -1)])
        table = padding_table(len(chunks) + columns, self.tables.padding_row, len(blocks) - padding)
        lengths = [length for _, _, length in chunks]
        for place, (row, first, _) in enumerate(chunks):
            table[:, place] = int(self.expected.table_rows[row]), first, sum(lengths[:place])
        return PrefillLayout(blocks.numpy(), table)

    def run(self, chunks: list[tuple[int, int, int]], padding: int = 0, columns: int = 1) -> None:
        """Prefill them by the step, too."""
        layout = self.layout(chunks, padding, columns)
        device = self.tables.device
        self.step.run(torch.from_numpy(layout.blocks).to(device), torch.from_numpy(layout.table).to(device))

    def check(self, tolerance: float = 0) -> None:
        """Every page but the null page holds what it should."""
        for ours, expected in ((self.cache.keys, self.expected.keys), (self.cache.values, self.expected.values)):
            pages = [page for page in range(ours.shape[1]) if page != NULL_PAGE]
            assert_close(ours[:, pages], expected[:, pages], rtol=0, atol=tolerance, equal_nan=True)


def random_passes(seed: int) -> list[list[tuple[int, int, int]]]:
    """Passes of ragged chunks (row, first position, length), until some rows are long."""
    rng = random.Random(seed)
    lengths = [0] * ROWS
    passes = []
    for _ in range(4):
        chunks = []
        for row in rng.sample(range(ROWS), rng.randint(1, ROWS)):
            length = rng.choice([1, 2, 7, 9])
            chunks.append((row, lengths[row], length))
            lengths[row] += length
        passes.append(chunks)
    return passes
