"""What an operator can set, by flag, environment variable or file: one model, validated once and frozen.

A flag wins over the environment, the environment over the file, the file over the default. `server.cli` makes the flags
of `blockserve serve` from the fields below, so a setting is declared in one place.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from engine.config import ConfigError, DType
from engine.model_files import model_name
from engine.process_config import EngineOptions, LogConfig, LogFormat, LogLevel
from server.api_keys import check_key, read_key_file

ENVIRONMENT_PREFIX = "BLOCKSERVE_"
CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"

SECRET_SETTINGS = frozenset({"api_key"})
"""Their values appear in no message."""

Group = Literal["Model", "Network", "Engine", "Limits", "Life cycle", "Logging"]
GROUPS: tuple[Group, ...] = ("Model", "Network", "Engine", "Limits", "Life cycle", "Logging")

MODEL_HELP = (
    "what to serve: the embedded model, a directory with config.json, tokenizer.json and safetensors weights, or the "
    "id of a model on the Hugging Face hub"
)


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


def _integer(value: object) -> object:
    """Literals of integers do not take the strings that flags and variables are."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,4}", value) else value


def _setting(default: Any, group: Group, metavar: str, description: str, *, shown: str | None = None) -> Any:
    """A field with what its flag's help needs; `shown` describes the default where its value does not."""
    return Field(
        default, description=description, json_schema_extra={"group": group, "metavar": metavar, "shown": shown}
    )


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
AutoDType = Annotated[DType | None, BeforeValidator(_auto_is_none)]


class ServeSettings(BaseModel):
    """Settings of `blockserve serve`. None means that the default is decided from device and model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = _setting(None, "Model", "MODEL", MODEL_HELP, shown="the embedded model")
    served_model_name: tuple[str, ...] = _setting(
        (),
        "Model",
        "NAME",
        "name or names that clients may use for the model; responses default to the first",
        shown="from --model",
    )
    random_weights: Annotated[int, Field(ge=0, lt=1 << 63)] | None = _setting(
        None,
        "Model",
        "SEED",
        "serve random weights drawn from this seed instead of those in the directory, for benchmarks",
        shown="off",
    )

    host: str = _setting("127.0.0.1", "Network", "ADDRESS", "address to listen on; 0.0.0.0 for every interface")
    port: Port = _setting(8000, "Network", "PORT", "port to listen on; 0 for any that is free")

    api_processes: Annotated[int, Field(ge=1, le=64)] | None = _setting(
        None, "Network", "N", "processes of the front end, behind one port", shown="auto: one for four cores, 8 at most"
    )

    api_key: tuple[SecretStr, ...] = _setting(
        (),
        "Network",
        "KEY",
        "key or keys, one of which a request has to bring; as a flag, whoever lists processes sees it",
        shown="none: everybody may",
    )
    api_key_file: str | None = _setting(
        None, "Network", "FILE", "file with such keys, one a line; lines that begin with # are comments", shown="none"
    )
    metrics_without_key: bool = _setting(
        False, "Network", "", "answer /metrics without a key too, as /health and /ready are", shown="off"
    )

    device: Annotated[str | None, BeforeValidator(_auto_is_none)] = _setting(
        None, "Engine", "DEVICE", "auto, cpu, cuda or cuda:N", shown="auto: CUDA where there is a device"
    )
    devices: tuple[str, ...] = _setting(
        (),
        "Engine",
        "DEVICE",
        "devices with an engine process each, like 0 1 (CUDA devices) or cpu cpu; instead of --device",
        shown="off: one engine",
    )
    dtype: AutoDType = _setting(
        None,
        "Engine",
        "DTYPE",
        "auto, float32, bfloat16 or float16",
        shown="auto: float32 on the CPU, else as the model says",
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = _setting(
        None, "Engine", "N", "CPU threads that the engine computes with", shown="auto: all cores but one"
    )
    max_rows: Annotated[int, Field(ge=1, le=65536)] | None = _setting(
        None, "Engine", "N", "requests that run at once", shown="auto: by device"
    )
    max_waiting: Annotated[int, Field(ge=1, le=1 << 20)] = _setting(
        2048, "Engine", "N", "requests that may wait for a row; more are answered 429"
    )
    page_size: Annotated[Literal[8, 16, 32, 64], BeforeValidator(_integer)] = _setting(
        16, "Engine", "N", "positions in a page of the KV cache: 8, 16, 32 or 64"
    )
    max_step_positions: Annotated[int, Field(ge=2, le=1 << 20)] | None = _setting(
        None,
        "Engine",
        "N",
        "positions that one step may work on, rows first, then prompts",
        shown="auto: by device and --prefer",
    )
    prefer: Literal["throughput", "latency"] = _setting(
        "throughput",
        "Engine",
        "WHAT",
        "throughput or latency: large steps, or small ones that keep the time between tokens short while prompts come; "
        "--max-step-positions overrides it",
    )
    kv_bytes: Annotated[ByteSize, Field(gt=0)] | None = _setting(
        None, "Engine", "BYTES", "memory for the KV cache, like 2GiB; instead of --memory-fraction", shown="off"
    )
    memory_fraction: Annotated[float, Field(gt=0, le=0.98, allow_inf_nan=False)] = _setting(
        0.9, "Engine", "X", "share of the device's memory left by the weights that the KV cache and steps may take"
    )
    prefix_cache: bool = _setting(
        True,
        "Engine",
        "",
        "keep prompts' pages, so that a prompt prefix that requests share is computed once",
        shown="on",
    )

    sync: bool = _setting(
        False,
        "Engine",
        "",
        "for debugging: finish each step before the next is planned, instead of planning while the device computes",
        shown="off",
    )

    max_choices: Annotated[int, Field(ge=1, le=65536)] = _setting(
        1024, "Limits", "N", "answers that one HTTP request may ask for: its prompts times n"
    )
    max_stop_strings: Annotated[int, Field(ge=1, le=1024)] = _setting(
        16, "Limits", "N", "stop strings that one HTTP request may give"
    )
    max_body_bytes: Annotated[ByteSize, Field(ge=1024, le=1 << 30)] = _setting(
        ByteSize(16 << 20), "Limits", "BYTES", "size of an HTTP request's body, like 16MiB", shown="16MiB"
    )
    max_unread: Annotated[int, Field(ge=1, le=1 << 20)] = _setting(
        1024, "Limits", "N", "blocks of each answer that a stream's client may be behind, before its connection is cut"
    )
    stall_timeout: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)] = _setting(
        60.0, "Limits", "SECONDS", "a client that takes nothing of what it is sent for so long loses its connection"
    )
    stream_chunks: Literal["block", "token"] = _setting(
        "block",
        "Limits",
        "UNIT",
        "what a chunk of a stream holds: a block, or a token for clients that count chunks as tokens",
    )

    drain_timeout: Seconds = _setting(
        30.0, "Life cycle", "SECONDS", "how long open requests may take to finish after SIGTERM or Ctrl-C"
    )
    step_timeout: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = _setting(
        60.0, "Life cycle", "SECONDS", "a step that takes longer turns /health red"
    )

    log_level: LogLevel = _setting("info", "Logging", "LEVEL", "debug, info, warning or error")
    log_format: LogFormat = _setting("plain", "Logging", "FORMAT", "plain, or json for one object a line")

    @field_validator("served_model_name", "api_key", "devices", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment has no lists: names, keys and devices are separated by commas there."""
        if isinstance(value, str):
            value = value.split(",")
        return [name.strip() if isinstance(name, str) else name for name in value] if isinstance(value, list) else value

    @field_validator("served_model_name")
    @classmethod
    def _whole_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name or not name.isprintable():
                raise ValueError("a name is empty or holds a character that cannot be printed")
        if len(set(value)) != len(value):
            raise ValueError("a name is given twice")
        return value

    @field_validator("api_key")
    @classmethod
    def _keys_can_travel(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in value:
            check_key(key.get_secret_value())
        return value

    @field_serializer("api_key", when_used="json")
    def _keys_for_the_api_process(self, value: tuple[SecretStr, ...]) -> list[str]:
        """JSON is how settings reach the API process, through a file in the supervisor's private directory."""
        return [key.get_secret_value() for key in value]

    @field_validator("host")
    @classmethod
    def _host_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the address is empty; give 127.0.0.1, or 0.0.0.0 for every interface")
        return value.strip()

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"cpu|cuda(:\d{1,4})?", value):
            raise ValueError(f'"{value}" is none of auto, cpu, cuda, cuda:N')
        return value

    @field_validator("devices", mode="after")
    @classmethod
    def _known_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # A flag takes several values, and 0,1 as one of them.
        names = [part.strip() for name in value for part in name.split(",")]
        devices = tuple(f"cuda:{name}" if re.fullmatch(r"\d{1,4}", name) else name for name in names)
        for device in devices:
            if not re.fullmatch(r"cpu|cuda:\d{1,4}", device):
                raise ValueError(f'"{device}" is none of cpu, cuda:N, N')
            if device != "cpu" and devices.count(device) > 1:
                raise ValueError(f"{device} is given twice: two engines cannot share the memory of a GPU")
        return devices

    @model_validator(mode="after")
    def _one_way_to_name_devices(self) -> Self:
        if self.devices and self.device is not None:
            raise ValueError("device and devices: give one of them")
        return self

    def engine_devices(self) -> tuple[str | None, ...]:
        """The device of each engine process; None is the engine's choice."""
        return self.devices or (self.device,)

    def engine_options(self, device: str | None = None) -> EngineOptions:
        """What an engine process is told; `device` is its own where there are several."""
        engines = self.engine_devices()
        return EngineOptions(
            device=device or self.device,
            dtype=self.dtype,
            max_rows=self.max_rows,
            max_waiting=self.max_waiting,
            page_size=self.page_size,
            max_step_positions=self.max_step_positions,
            prefer=self.prefer,
            kv_bytes=None if self.kv_bytes is None else int(self.kv_bytes),
            # All engines on the CPU take their memory from one pool.
            memory_fraction=self.memory_fraction / (engines.count("cpu") if device == "cpu" else 1),
            prefix_cache=self.prefix_cache,
            overlapped=False if self.sync else None,
        )

    def engine_threads(self) -> int | None:
        """CPU threads of each engine process; None leaves it to the only one there is."""
        engines = len(self.engine_devices())
        if self.threads is not None or engines == 1:
            return self.threads
        return max(1, (len(os.sched_getaffinity(0)) - 1) // engines)

    def front_ends(self) -> int:
        """How many API processes there are."""
        return self.api_processes or min(8, max(1, len(os.sched_getaffinity(0)) // 4))

    def model_names(self) -> tuple[str, ...]:
        """The names clients may use for the model; the first is the one that responses default to."""
        return self.served_model_name or (model_name(self.model),)

    def api_keys(self) -> tuple[str, ...]:
        """The keys that requests may bring; none means that they need none."""
        assert self.api_key or self.api_key_file is None, "the file of keys was not read"
        return tuple(key.get_secret_value() for key in self.api_key)

    def log_config(self) -> LogConfig:
        """How every process logs."""
        return LogConfig(level=self.log_level, format=self.log_format)


def flag_name(field: str) -> str:
    """`max_rows` -> `--max-rows`."""
    return "--" + field.replace("_", "-")


def load_settings(
    flags: Mapping[str, object], environment: Mapping[str, str], defaults: Mapping[str, object] | None = None
) -> ServeSettings:
    """The settings from all sources; `defaults` are other ones than those of `blockserve serve`.

    `flags` holds what was given on the command line by field name, and under "config" the path of a TOML file, which
    the environment may name too. Keys in `api_key_file` are added to `api_key`. Raises ConfigError saying which flag,
    variable or key is at fault.
    """
    flags = dict(flags)
    path = flags.pop("config", None) or environment.get(CONFIG_VARIABLE)
    sources: dict[str, str] = {}
    values: dict[str, object] = dict(defaults or {})
    if path:
        values.update(_read_file(Path(str(path)).expanduser()))
        sources.update({name: f"{path}: {name}" for name in values})
    for name in ServeSettings.model_fields:
        variable = ENVIRONMENT_PREFIX + name.upper()
        # An empty variable is how a compose file spells one that is not set.
        if environment.get(variable):
            values[name], sources[name] = environment[variable], variable
        if name in flags:
            values[name], sources[name] = flags[name], flag_name(name)
    try:
        settings = ServeSettings.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item, sources) for item in error.errors(include_url=False))) from None
    if settings.api_key_file is None:
        return settings
    return _with_keys_of_file(settings, settings.api_key_file, sources["api_key_file"])


def _with_keys_of_file(settings: ServeSettings, file: str, source: str) -> ServeSettings:
    path = Path(file).expanduser()
    try:
        keys = read_key_file(path)
    except OSError as error:
        raise ConfigError(f"{source}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {path}: {error}") from None
    return settings.model_copy(update={"api_key": (*settings.api_key, *map(SecretStr, keys))})


def _read_file(path: Path) -> dict[str, object]:
    """The settings in a TOML file, spelt as flags (max-rows) or fields (max_rows)."""
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in data.items()}


def _describe(item: Any, sources: Mapping[str, str]) -> str:
    field = str(item["loc"][0]) if item["loc"] else ""
    where = sources.get(field, field)
    if item["type"] == "extra_forbidden":
        return f"{where} is no setting"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" or field in SECRET_SETTINGS else f" (got {str(item['input'])[:80]!r})"
    return f"{where}: {message}{given}"
