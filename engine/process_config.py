"""What a child process is told at its start: a JSON file in the supervisor's private directory.

Torch-free. The path of the file is a child's only argument. Files are written and read by one installation, so a field
more or less than declared is an error.
"""

from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from engine.config import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["plain", "json"]
Preference = Literal["throughput", "latency"]
"""What steps are sized for."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a process logs."""

    level: LogLevel = "info"
    format: LogFormat = "plain"


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`engine.config.EngineConfig` as the operator left it: None is decided by the engine, from device and model."""

    device: str | None = None
    dtype: str | None = None
    max_rows: int | None = None
    max_waiting: int | None = None
    page_size: int | None = None
    max_step_positions: int | None = None
    prefer: Preference = "throughput"
    """What `max_step_positions` is chosen for where it is None."""
    kv_bytes: int | None = None
    memory_fraction: float | None = None
    prefix_cache: bool | None = None
    overlapped: bool | None = None
    cuda_graphs: bool | None = None


class EngineProcessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one engine process."""

    index: int
    name: str
    """What clients call the model."""
    model: str
    """The model's directory."""
    options: EngineOptions
    socket_path: str
    """Where the engine listens for API processes; nothing is there when it starts."""
    control_path: str
    """Where the supervisor listens."""
    log: LogConfig
    random_seed: int | None = None
    """Random weights drawn from this seed, instead of those in the directory."""
    step_timeout_s: float = 60.0
    """Seconds after which a step is logged as hanging."""
    threads: int | None = None
    """CPU threads the engine computes with. None: all cores but one."""


class ApiProcessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one API process."""

    index: int
    model: str
    """The model's directory, for its tokenizer."""
    listen_fd: int
    """The listening socket, inherited from the supervisor."""
    engine_sockets: list[str]
    control_path: str
    settings: str
    """The command's settings as JSON (`server.settings.ServeSettings`)."""
    log: LogConfig


C = TypeVar("C", EngineProcessConfig, ApiProcessConfig)


def write_process_config(path: Path, config: EngineProcessConfig | ApiProcessConfig) -> None:
    """Write the file that `read_process_config` reads, replacing one that is there."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def read_process_config(path: Path, kind: type[C]) -> C:
    """The configuration in `path`. Raises ConfigError if it cannot be read or is not a `kind`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no configuration of this process: {error}") from None
