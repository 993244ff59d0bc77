from collections.abc import Callable

import pytest
import torch

from engine.config import ConfigError, EngineConfig
from engine.graph_pool import GraphPool
from engine.kv_cache import KVLayout, plan_pages
from engine.prefill_graphs import BUCKET
from engine.runner import Runner
from engine.types import GenerationRequest, SamplingParams
from tests.engine.helpers import DEVICES, GoldenModel
from tests.engine.test_failures import memory_left, run

MODEL = GoldenModel("lookup_prefix2")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@pytest.mark.parametrize("device", DEVICES)
def test_a_rehearsal_changes_no_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = GenerationRequest.of(
        request_id=0,
        prompt_token_ids=tuple(range(3, 60)),
        params=SamplingParams(max_tokens=30, seed=1, ignore_eos=True),
    )
    launch = Runner.launch
    rehearsals = 0

    def after_a_rehearsal(runner: Runner, *arguments: object) -> object:
        nonlocal rehearsals
        rehearsals += 1
        # More positions than a request can have, and than the page size divides.
        runner.rehearse(positions=3 * MODEL.config.max_positions + 5, rows=4)
        return launch(runner, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "launch", after_a_rehearsal)
    core = MODEL.core(device=device, max_rows=4)
    assert [token for delta in run(core, [request])[0] for token in delta.token_ids] == MODEL.oracle(request).token_ids
    assert rehearsals > 7


def test_what_steps_take_is_not_given_to_pages() -> None:
    layout = KVLayout.of(MODEL.config.block_decoder, 16, torch.float32)
    config = EngineConfig.create(memory_fraction=0.5, max_rows=64)
    free = 220 * layout.page_bytes
    all_of_it = plan_pages(layout, MODEL.config, config, free)
    assert plan_pages(layout, MODEL.config, config, free, 20 * layout.page_bytes) == all_of_it - 20
    with pytest.raises(ConfigError, match=rf"less {free}"):
        plan_pages(layout, MODEL.config, config, free, free)


@on_cuda
def test_every_graph_is_captured_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = 0
    capture = GraphPool.capture

    def counted(pool: GraphPool, work: Callable[[], object]) -> object:
        nonlocal captures
        captures += 1
        return capture(pool, work)

    monkeypatch.setattr(GraphPool, "capture", counted)
    core = MODEL.core(device="cuda:0", max_rows=12, max_step_positions=2 * BUCKET + 1)
    assert captures == 10 + 3, "for 1 to 8, 10 and 12 rows, and for one to three buckets of positions"
    prompts = [
        GenerationRequest.of(
            request_id=index, prompt_token_ids=(1, 2, 3, 4), params=SamplingParams(max_tokens=9, seed=0)
        )
        for index in range(11)
    ]
    run(core, prompts)
    assert captures == 10 + 3


@on_cuda
def test_pages_take_what_the_largest_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.free_memory", lambda device: 1 << 31)
    sizes = (1 << 15, 1 << 17)
    pages = [MODEL.core(device="cuda:0", max_rows=1 << 14, max_step_positions=size).info.pages for size in sizes]
    assert pages[1] < pages[0]


@on_cuda
def test_a_step_that_does_not_fit_is_an_error_that_names_the_options() -> None:
    with memory_left(64 << 20), pytest.raises(ConfigError, match=r"max_step_positions, max_rows.*1048576 positions"):
        MODEL.core(device="cuda:0", max_step_positions=1 << 20)
