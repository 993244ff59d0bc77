"""The repository as tests look at it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def project_files() -> list[Path]:
    """What git has or would add; every file, where the project was unpacked without git."""
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.rglob("*") if path.is_file() and not _left_behind(path)]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def _left_behind(path: Path) -> bool:
    """Whether a tool or an environment left the file: those hide behind a dot, but for bytecode."""
    folders = path.relative_to(ROOT).parts[:-1]
    return any(part == "__pycache__" or (part.startswith(".") and part != ".ci") for part in folders)
