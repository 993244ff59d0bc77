"""Which version this is."""

import subprocess
from importlib import metadata
from pathlib import Path

import msgspec

DISTRIBUTION = "blockserve"


class VersionInfo(msgspec.Struct, frozen=True):
    """What GET /version answers."""

    version: str
    commit: str | None
    """Of the checkout that runs; None where it is not a checkout."""


def version_info() -> VersionInfo:
    """Read the installed version and the checkout's commit."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "unknown"
    return VersionInfo(version=version, commit=_commit(Path(__file__).resolve().parent.parent))


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
