"""The output of a batch: an answer a line, as OpenAI's batch files have them, in the order in which they were ready.

A run that was interrupted leaves a file that the next one goes on with: what has an answer in it is not asked again.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from server.batch.ask import Answer


class OutputError(Exception):
    """A file that cannot be written, or not gone on with. The message says why."""


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _LineError(msgspec.Struct, frozen=True):
    code: str
    message: str


class _Result(msgspec.Struct, frozen=True):
    """A line. A request that was answered has a response, with an error's envelope if it was refused."""

    id: str
    custom_id: str | None
    response: _Response | None
    error: _LineError | None


class _Told(msgspec.Struct, frozen=True):
    """What is read of a response."""

    status_code: int


class _Earlier(msgspec.Struct, frozen=True):
    """What is read of an earlier run's line."""

    custom_id: str
    response: _Told | None


class Results:
    """A file of results, open at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, custom_id: str, answer: Answer) -> None:
        """Add an answer, whole or, if this process dies, not at all as far as the next run sees."""
        response = _Response(answer.status, answer.request_id, msgspec.Raw(answer.body))
        self._write(_Result(_new_id(), custom_id, response, None))

    def write_unread(self, number: int, message: str) -> None:
        """Add that the input's line `number` is no request."""
        self._write(_Result(_new_id(), None, None, _LineError("invalid_line", f"line {number}: {message}")))

    def _write(self, result: _Result) -> None:
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()


@contextmanager
def continue_output(path: Path) -> Iterator[tuple[Results, set[str]]]:
    """The output file, made where there is none, and the custom ids that have their answer in it. Raises OutputError.

    While it is open no other run can write it.
    """
    with _opened(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{path} is being written by another run") from None
        yield Results(file), _answered(path)


@contextmanager
def new_errors(path: Path | None) -> Iterator[Results | None]:
    """A file for what is refused, empty at first; none without a path. Raises OutputError."""
    if path is None:
        yield None
        return
    with _opened(path, "wb") as file:
        yield Results(file)


@contextmanager
def _opened(path: Path, mode: Literal["ab", "wb"]) -> Iterator[BinaryIO]:
    try:
        file = path.open(mode)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    with file:
        yield file


def _answered(path: Path) -> set[str]:
    """The custom ids of an output's answers. Cuts off a last line that its run did not finish."""
    answered, end = set(), 0
    decoder = msgspec.json.Decoder(_Earlier)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                os.truncate(path, end)
                break
            try:
                result = decoder.decode(line)
            except msgspec.DecodeError:
                message = "is no result of a batch: move the file away, or name another with -o"
                raise OutputError(f"{path}:{number} {message}") from None
            if result.response is not None and result.response.status_code == 200:
                answered.add(result.custom_id)
            end += len(line)
    return answered


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
