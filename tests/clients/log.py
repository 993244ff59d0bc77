"""What a run says: on the terminal, and in a file under docs/ without anything of the machine."""

from pathlib import Path

import httpx


class RunLog:
    """Lines that are printed as they come, and written when the run has ended well."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[str] = []

    def begin(self, url: str) -> None:
        """Say which server this is about, once."""
        if self._lines:
            return
        version = httpx.get(f"{url}/version").json()
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        self.write(f"blockserve {version['version']}, commit {version['commit']}, model {model} on the CPU")

    def write(self, line: str) -> None:
        """One line."""
        print(line, flush=True)
        self._lines.append(line)

    def close(self) -> None:
        """Write the file, if there is to be one."""
        if self._path is not None:
            self._path.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
