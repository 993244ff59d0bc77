"""Buckets, padding and buffers of prefill graphs, replayed on a GPU where there is one; and a core that has them."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import prefill_graphs
from engine.core import EngineCore
from engine.kv_cache import KVCache, KVLayout
from engine.prefill_graphs import BUCKET, GRAPH_COLUMNS, GRAPH_POSITIONS, PrefillGraphs, largest_graph
from engine.prefill_layout import PrefillLayout, padding_table
from engine.prefill_step import PrefillStep
from engine.types import GenerationRequest, SamplingParams
from kernels.dispatch import select_kernels
from tests.engine.eager_pool import EagerPool, graph_pool_on, use_pool
from tests.engine.helpers import DEVICES, GoldenModel
from tests.engine.model.test_model import CONFIGS
from tests.engine.prefills import ROUNDING, Prefills, random_passes
from tests.engine.test_failures import run, tokens_of


class RecordingStep(PrefillStep):
    """Remembers what it was to do, and does nothing."""

    def __init__(self) -> None:
        self.runs: list[tuple[Tensor, Tensor]] = []

    def run(self, blocks: Tensor, table: Tensor) -> None:
        self.runs.append((blocks.clone(), table.clone()))


def recording_graphs(max_step_positions: int, captures: int = 1 << 30) -> tuple[PrefillGraphs, RecordingStep]:
    """Graphs, none of them captured, of a step that only remembers."""
    prefills = Prefills(CONFIGS[0])
    step = RecordingStep()
    pool = EagerPool(captures)
    return PrefillGraphs(step, prefills.tables, prefills.staging, pool, max_step_positions), step


def layout_of(positions: int, chunks: int = 1) -> PrefillLayout:
    """So many blocks of tokens 1, 2, ..., in chunks of one block each but for the last."""
    columns = 4 * (chunks // 4 + 1)
    table = padding_table(columns, 8, positions)
    table[:, :chunks] = range(chunks), [7] * chunks, range(chunks)
    return PrefillLayout(np.arange(1, 1 + 4 * positions, dtype=np.int32).reshape(-1, 4), table)


@pytest.mark.parametrize(
    ("max_step_positions", "buckets"),
    [(5, [5]), (BUCKET, [BUCKET]), (300, [300, 256, 128]), (1 << 14, list(range(GRAPH_POSITIONS, 0, -BUCKET)))],
)
def test_every_bucket_is_captured_with_nothing_but_padding(max_step_positions: int, buckets: list[int]) -> None:
    graphs, step = recording_graphs(max_step_positions)
    graphs.capture_all()
    assert [len(blocks) for blocks, _ in step.runs] == buckets
    assert buckets[0] == largest_graph(max_step_positions)
    for _, table in step.runs:
        assert table.tolist() == padding_table(GRAPH_COLUMNS, 8).tolist()


def test_a_replay_has_the_layout_and_padding_behind_it() -> None:
    graphs, step = recording_graphs(300)
    graphs.capture_all()
    for positions, chunks, bucket in ((200, 3, 256), (1, 1, 128), (128, GRAPH_COLUMNS - 1, 128), (257, 30, 300)):
        layout = layout_of(positions, chunks)
        assert graphs.run(layout)
        blocks, table = step.runs[-1]
        assert len(blocks) == bucket
        assert blocks[:positions].tolist() == layout.blocks.tolist()
        assert table.tolist() == layout.widened(GRAPH_COLUMNS).tolist()


def test_what_no_graph_holds_is_left_to_the_caller() -> None:
    graphs, step = recording_graphs(300, captures=2)
    assert not graphs.run(layout_of(1)), "before the capture"
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture_all()
    done = len(step.runs)
    assert not graphs.run(layout_of(128)), "memory ran out before this bucket"
    assert not graphs.run(layout_of(301))
    assert not graphs.run(layout_of(256, GRAPH_COLUMNS))
    assert len(step.runs) == done
    assert graphs.run(layout_of(256, GRAPH_COLUMNS - 1))


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_replay_gives_what_the_model_gives(device: str) -> None:
    where = torch.device(device)
    for seed in range(6):
        prefills = Prefills(CONFIGS[0], where, select_kernels(where))
        graphs = PrefillGraphs(prefills.step, prefills.tables, prefills.staging, graph_pool_on(where), 100)
        graphs.capture_all()
        prefills.check()
        for chunks in random_passes(seed):
            with prefills.staging.step():
                assert graphs.run(prefills.layout(chunks))
        prefills.check(ROUNDING)


def full_of_nan(layout: KVLayout, pages: int, device: torch.device) -> KVCache:
    """A cache that holds NaN wherever nothing was written, in the null page too."""
    shape = (layout.num_layers, pages + 1, layout.num_heads, layout.page_size, layout.head_size)
    return KVCache(layout, *(torch.full(shape, torch.nan, dtype=layout.dtype, device=device) for _ in range(2)))


def requests_of_all_lengths() -> list[GenerationRequest]:
    """Prompts of 2 to 25 blocks of four tokens, greedy and sampled; the first are short."""
    lengths = (5, 6, 7, 8, *range(11, 100, 11))
    return [
        GenerationRequest.of(
            request_id=index,
            prompt_token_ids=tuple(range(20 + 7 * index, 20 + 7 * index + length)),
            params=SamplingParams(max_tokens=9 + index, temperature=float(index % 2), seed=index, ignore_eos=True),
        )
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("variant", ["lookup_prefix2", "lookup_projection", "lookup_summation", "vanilla_gptneox"])
def test_a_core_with_graphs_gives_the_oracles_tokens(
    variant: str, overlapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its prefills have a graph, some are too long, and some have too many chunks."""
    use_pool(monkeypatch, EagerPool())
    monkeypatch.setattr(KVCache, "allocate", full_of_nan)
    monkeypatch.setattr(prefill_graphs, "BUCKET", 8)
    monkeypatch.setattr(prefill_graphs, "GRAPH_POSITIONS", 24)
    monkeypatch.setattr(prefill_graphs, "GRAPH_COLUMNS", 4)
    seen = set()
    replay = PrefillGraphs.run

    def counted(graphs: PrefillGraphs, layout: PrefillLayout) -> bool:
        done = replay(graphs, layout)
        too_long, too_many = len(layout.blocks) > 24, layout.table.shape[1] > 4
        assert done == (not too_long and not too_many)
        seen.add((too_long, too_many))
        return done

    monkeypatch.setattr(PrefillGraphs, "run", counted)
    model = GoldenModel(variant)
    requests = requests_of_all_lengths()
    answered = run(model.core(max_rows=5, page_size=8, max_step_positions=32, overlapped=overlapped), requests)
    for request in requests:
        assert tokens_of(answered[request.request_id]) == model.oracle(request).token_ids
    assert seen >= {(False, False), (True, False), (False, True)}


def test_a_core_whose_memory_does_not_suffice_for_graphs_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = GoldenModel("lookup_prefix2")
    make = partial(model.core, max_rows=4)
    requests = requests_of_all_lengths()[:4]
    for graphs_of_rows, warnings in ((4, 1), (2, 2)):
        pool = EagerPool(graphs_of_rows)
        use_pool(monkeypatch, pool)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="engine"):
            core: EngineCore = make()
        assert ["graphs" in record.getMessage() for record in caplog.records] == [True] * warnings
        pool.captures_left = 4 - graphs_of_rows
        answered = run(core, requests)
        for request in requests:
            assert tokens_of(answered[request.request_id]) == model.oracle(request).token_ids
