"""An engine on a device that is not the current one."""

import pytest
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.device import device_name, on_device
from engine.types import GenerationRequest, SamplingParams
from tests.engine.helpers import CPU, GOLDEN


def answer(device: str) -> list[int]:
    """What a golden model says on the device, from weights on disk to the last token."""
    config = EngineConfig.create(device=device, max_rows=4, kv_bytes=1 << 20)
    core = EngineCore.load("golden", GOLDEN / "lookup_prefix2", config)
    params = SamplingParams(temperature=0, max_tokens=12, seed=0, ignore_eos=True)
    core.add([(1, GenerationRequest.of(request_id=1, prompt_token_ids=tuple(range(1, 10)), params=params))])
    tokens: list[int] = []
    while core.has_work:
        report = core.step()
        for _, delta in report.deltas if report is not None else ():
            tokens += delta.token_ids
    return tokens


def test_a_cpu_is_always_current() -> None:
    with on_device(CPU), on_device(CPU):
        assert device_name(CPU) == "cpu"
    assert len(answer("cpu")) == 12


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine does not have two CUDA devices")
def test_an_engine_computes_on_its_own_device_whatever_is_current() -> None:
    assert answer("cuda:1") == answer("cuda:0")
    assert torch.cuda.current_device() == 0
