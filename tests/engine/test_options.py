import pytest
import torch

from engine.config import ConfigError
from engine.options import resolve_device, resolve_options
from engine.process_config import EngineOptions
from tests.engine.helpers import GoldenModel

MODEL = GoldenModel("lookup_prefix2").config


def test_the_cpu_computes_in_float32_unless_told() -> None:
    model = MODEL.model_copy(update={"dtype": "bfloat16"})
    assert resolve_options(EngineOptions(device="cpu"), model).dtype == "float32"
    assert resolve_options(EngineOptions(device="cpu", dtype="bfloat16"), model).dtype == "bfloat16"


def test_what_is_given_is_kept_and_the_rest_fits_it() -> None:
    config = resolve_options(EngineOptions(device="cpu", max_rows=700), MODEL)
    assert config.max_rows == 700
    assert config.max_step_positions > 700
    with pytest.raises(ConfigError, match="max_step_positions 5 has to exceed max_rows 7"):
        resolve_options(EngineOptions(device="cpu", max_rows=7, max_step_positions=5), MODEL)


def test_latency_is_bought_with_smaller_steps() -> None:
    fast = resolve_options(EngineOptions(device="cpu", max_rows=8), MODEL)
    prompt = resolve_options(EngineOptions(device="cpu", max_rows=8, prefer="latency"), MODEL)
    assert prompt.max_step_positions < fast.max_step_positions
    given = resolve_options(EngineOptions(device="cpu", max_rows=8, prefer="latency", max_step_positions=99), MODEL)
    assert given.max_step_positions == 99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_steps_of_small_models_hold_more_positions() -> None:
    large = MODEL.model_copy(
        update={"block_decoder": MODEL.block_decoder.model_copy(update={"num_layers": 10**6, "hidden_size": 2048})}
    )
    assert resolve_options(EngineOptions(device="cuda"), large).max_step_positions == 16384
    assert resolve_options(EngineOptions(device="cuda"), MODEL).max_step_positions == 65536
    assert resolve_options(EngineOptions(device="cuda", prefer="latency"), MODEL).max_step_positions == 8192


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:-1", "cpu:x", ""])
def test_an_unknown_device_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="device: cuda:3 is not there"):
        resolve_device("cuda:3")
    assert resolve_device(None) == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_a_cuda_index_past_the_last_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"device: cuda:99 is not there: this machine has \d+"):
        resolve_device("cuda:99")
    assert resolve_device(None) == torch.device("cuda", 0)
