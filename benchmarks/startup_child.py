"""One start of an engine in a process of its own: `python -m benchmarks.startup_child MODEL_DIRECTORY OPTIONS`.

OPTIONS are `EngineOptions` as JSON. Goes the engine process's way to its first token: weights read ahead, torch
imported, model loaded, one request answered. Prints a `Start` as JSON.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from engine.model_files import read_ahead
from engine.process_config import EngineOptions
from engine.types import GenerationRequest, SamplingParams


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """When the first token was there, in monotonic seconds, which all processes of a machine share."""

    first_token: float
    imported: float
    """When all imports were done."""
    parts: dict[str, float]
    """Seconds from there, by what was done."""
    device: str
    kv_bytes: int
    """Of the KV cache."""


@contextmanager
def timed(owner: Any, name: str, label: str, parts: dict[str, float]) -> Iterator[None]:
    """Add up, while entered, the seconds in `owner`'s function or method `name`."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        started = time.monotonic()
        try:
            return function(*arguments, **keywords)
        finally:
            parts[label] = parts.get(label, 0.0) + time.monotonic() - started

    with patch.object(owner, name, wrapped):
        yield


def start(directory: Path, options: EngineOptions) -> Start:
    """Load the model and write a first token."""
    read_ahead(directory)
    # As in the engine process, behind the first reads.
    from engine import core as core_module
    from engine.config import ModelConfig
    from engine.options import resolve_options
    from engine.runner import Runner

    imported = time.monotonic()
    parts: dict[str, float] = {}
    config = resolve_options(options, ModelConfig.load(directory))
    with (
        timed(core_module, "load_weights", "weights", parts),
        timed(core_module, "activation_bytes", "rehearsal", parts),
        timed(Runner, "capture_graphs", "graphs", parts),
    ):
        core = core_module.EngineCore.load("startup", directory, config)
    loaded = time.monotonic()
    parts["other"] = loaded - imported - sum(parts.values())
    params = SamplingParams(max_tokens=1, temperature=0, seed=0, ignore_eos=True)
    core.add([(0, GenerationRequest.of(request_id=0, prompt_token_ids=(1,) * 128, params=params))])
    while core.has_work:
        core.step()
    first_token = time.monotonic()
    parts["first token"] = first_token - loaded
    return Start(
        first_token=first_token,
        imported=imported,
        parts=parts,
        device=core.info.device,
        kv_bytes=core.info.kv_bytes,
    )


def main() -> None:
    """Start, and say how long it took."""
    options = msgspec.json.decode(sys.argv[2], type=EngineOptions)
    print(msgspec.json.encode(start(Path(sys.argv[1]), options)).decode())


if __name__ == "__main__":
    main()
