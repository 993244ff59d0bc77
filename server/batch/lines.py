"""The input of a batch: a request a line, as OpenAI's batch files have them.

{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 16}}
"""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

METHOD = "POST"
URL = "/v1/completions"


class LineError(ValueError):
    """A line that is no request. The message says what is wrong with it."""


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw
    """JSON, looked at by whoever answers it."""


class Line(NamedTuple):
    """A request and where it stands, from 1."""

    number: int
    request: BatchRequest


class Survey(NamedTuple):
    """What an input holds."""

    left: int
    """Requests that have no answer yet."""
    answered: int
    bad: dict[int, str]
    """What is wrong with lines that are skipped, by their number."""


_decoder = msgspec.json.Decoder(BatchRequest)


def parse_line(line: bytes) -> BatchRequest:
    """The request in a line. Raises LineError."""
    try:
        request = _decoder.decode(line)
    except msgspec.ValidationError as error:
        raise LineError(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LineError(f"it is not valid JSON: {error}") from None
    if not request.custom_id:
        raise LineError("custom_id is empty")
    if request.method != METHOD:
        raise LineError(f'method has to be {METHOD}, not "{request.method[:80]}"')
    if request.url != URL:
        raise LineError(f'url has to be {URL}, not "{request.url[:80]}"')
    return request


def survey(path: Path, answered: Container[str]) -> Survey:
    """Read an input through, with the custom ids of requests that are `answered` already. OSError if it cannot be."""
    numbers: dict[str, int] = {}
    bad: dict[int, str] = {}
    done = 0
    for number, line in _lines(path):
        try:
            request = parse_line(line)
        except LineError as error:
            bad[number] = str(error)
            continue
        first = numbers.setdefault(request.custom_id, number)
        if first != number:
            bad[number] = f'custom_id "{request.custom_id[:80]}" is that of line {first}'
        else:
            done += request.custom_id in answered
    return Survey(len(numbers) - done, done, bad)


def unanswered(path: Path, answered: Container[str], bad: Container[int]) -> Iterator[Line]:
    """The requests that a survey found to be left, in the order of the file."""
    for number, line in _lines(path):
        if number in bad:
            continue
        request = parse_line(line)
        if request.custom_id not in answered:
            yield Line(number, request)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line
