"""What an operator leaves open ("auto"), decided from the device and the model."""

import math

import msgspec
import torch

from engine.config import ConfigError, EngineConfig, ModelConfig
from engine.process_config import EngineOptions, Preference

DEFAULT_ROWS = {"cpu": 64, "cuda": 1024}
DEFAULT_STEP_POSITIONS: dict[str, dict[Preference, int]] = {
    "cpu": {"throughput": 512, "latency": 64},
    "cuda": {"throughput": 16384, "latency": 2048},
}
"""For a large model: a full step of prompts takes 35 ms of an H100 with REFERENCE_PARAMETERS, or an eighth of that."""
REFERENCE_PARAMETERS = 600e6
MOST_STEP_POSITIONS = 4
"""Times as many positions, at the most, go into a step of a model that takes less time for each."""


def resolve_options(options: EngineOptions, model: ModelConfig) -> EngineConfig:
    """The engine's settings, with what was left open filled in. Raises ConfigError naming the option at fault."""
    device = resolve_device(options.device)
    values = {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    prefer: Preference = values.pop("prefer")
    values["device"] = str(device)
    # A CPU computes fastest, and exactly as the tests prove it, in float32.
    values.setdefault("dtype", "float32" if device.type == "cpu" else model.dtype)
    rows = values.setdefault("max_rows", DEFAULT_ROWS[device.type])
    values.setdefault("max_step_positions", max(_step_positions(device.type, prefer, model), 2 * rows))
    # On the CPU a step is done when it is launched: there is nothing to overlap, and tokens would come a step late.
    values.setdefault("overlapped", device.type != "cpu")
    return EngineConfig.create(**values)


def _step_positions(device_type: str, prefer: Preference, model: ModelConfig) -> int:
    """Positions of a step that takes about as long for any model, in powers of two."""
    positions = DEFAULT_STEP_POSITIONS[device_type][prefer]
    if device_type == "cpu":
        return positions
    decoder = model.block_decoder
    layer = 4 * decoder.hidden_size**2 + 2 * decoder.hidden_size * decoder.intermediate_size
    times = min(max(REFERENCE_PARAMETERS / (decoder.num_layers * layer), 1), MOST_STEP_POSITIONS)
    return positions << round(math.log2(times))


def resolve_device(name: str | None) -> torch.device:
    """The device called `name` (None: CUDA where there is one). Raises ConfigError if it is not there."""
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device: "{name}" is none of auto, cpu, cuda, cuda:N') from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f'device: "{name}" is none of auto, cpu, cuda, cuda:N')
    if not torch.cuda.is_available():
        built = "finds none" if torch.version.cuda else "is a build without CUDA"
        raise ConfigError(f"device: {name} is not there: this torch ({torch.__version__}) {built}")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name} is not there: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0"
        )
    return torch.device("cuda", index)
