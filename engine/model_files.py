"""Where a model's files are: the embedded default, a directory, or a model id of the Hugging Face hub. Torch-free."""

from pathlib import Path
from threading import Thread

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.config import ConfigError

DEFAULT_MODEL = "blockserve-stories"
"""The name of the embedded model."""

READ_AHEAD_THREADS = 4
READ_AHEAD_BYTES = 1 << 24

_PATTERNS = ["*.json", "*.safetensors"]


def embedded_model_directory() -> Path:
    """The directory of the model that comes with the package."""
    return Path(__file__).parent / "default_model"


def find_model(model: str | None) -> Path:
    """The directory that holds `model`: None or its name for the embedded one, a path, or a hub id ("owner/name").

    Only a hub id may reach the network; what was downloaded before is found without it. Raises ConfigError.
    """
    if model is None or model == DEFAULT_MODEL:
        return embedded_model_directory()
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(f"model: {model} is a file; name the directory that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"model: there is no directory {model}")
    return _download(model)


def model_name(model: str | None) -> str:
    """The name that clients see unless an operator chooses another: the directory's name, or the hub id."""
    if model is None:
        return DEFAULT_MODEL
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def read_ahead(directory: Path) -> list[Thread]:
    """Have the weights of a directory read into the system's file cache while the caller does something else.

    Who imports torch meanwhile, which takes seconds, then finds them there. Returns the threads that read; nobody has
    to wait for them, and what they cannot read is left to whoever needs it.
    """
    parts = [
        (path, start)
        for path in sorted(directory.glob("*.safetensors"))
        if path.is_file()
        for start in range(0, path.stat().st_size, READ_AHEAD_BYTES)
    ]
    threads = [
        Thread(target=_read_parts, args=(parts[place::READ_AHEAD_THREADS],), name="read-ahead", daemon=True)
        for place in range(READ_AHEAD_THREADS)
    ]
    for thread in threads:
        thread.start()
    return threads


def _read_parts(parts: list[tuple[Path, int]]) -> None:
    buffer = bytearray(READ_AHEAD_BYTES)
    for path, start in parts:
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                file.readinto(buffer)
        except OSError:
            return


def _download(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(model, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model: there is no directory {model}, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from None
