"""An environment for each client: the client as its registry has it, and nothing of ours."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch<2.14"
"""guidellm alone would pull a build for CUDA."""


class NotInstalledError(Exception):
    """A client that cannot be had here, and why."""


@dataclass(frozen=True)
class Environment:
    """Packages of PyPI, or of npm."""

    packages: tuple[str, ...]
    npm: bool = False

    def interpreter(self, home: Path) -> Path:
        """What runs a program in the environment that lies in `home`."""
        return Path("node") if self.npm else home / "bin" / "python"

    def make(self, home: Path) -> None:
        """Install into `home`, unless it has just that already. Raises NotInstalledError."""
        stamp, wanted = home / "packages.txt", "\n".join(self.packages)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return
        home.mkdir(parents=True, exist_ok=True)
        if self.npm:
            _install(["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(home), *self.packages])
        else:
            _install([sys.executable, "-m", "venv", "--clear", str(home)])
            _install([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *self.packages])
        stamp.write_text(wanted, encoding="utf-8")

    def version(self, home: Path, package: str) -> str:
        """Which version of a package `home` has."""
        if self.npm:
            told: str = json.loads((home / "node_modules" / package / "package.json").read_text("utf-8"))["version"]
            return told
        program = f"from importlib.metadata import version; print(version({package!r}))"
        command = [str(home / "bin" / "python"), "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotInstalledError(str(error)) from None
    if done.returncode:
        raise NotInstalledError((done.stderr or done.stdout).strip().splitlines()[-1])
