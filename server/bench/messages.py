"""What the load tester and its worker processes tell each other: lines of JSON one way, frames of msgpack the other.

A worker reads a `Work`, answers `Ready`, reads a `Begin`, and sends `Progress` until it sends its `Records`.
Moments are monotonic seconds, which all processes of a machine share.
"""

import struct
from typing import Literal

import msgspec

from server.bench.http_client import Address


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens a prompt or an answer has: `mean`, or drawn anew for each request."""

    kind: Literal["fixed", "uniform", "lognormal"]
    mean: int = 0
    low: int = 0
    high: int = 0
    """Uniform: the shortest and the longest."""
    sigma: float = 0.0
    """Log-normal: the standard deviation of the logarithm."""


class Prompt(msgspec.Struct, frozen=True):
    """A prompt of a file, and how many tokens its answer shall have, if the file says so."""

    text: str | list[int]
    max_tokens: int | None = None


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's share of a load."""

    address: Address
    headers: dict[str, str]
    model: str | None
    streamed: bool
    ignore_eos: bool
    temperature: float
    prompts: list[Prompt]
    """Of a file, in turn; none means random ones."""
    prompt_lengths: Lengths
    output_lengths: Lengths
    vocab_size: int
    """Random prompts are token ids from 1 to this, exclusive."""
    words: bool
    """Random prompts are words, not token ids."""
    concurrency: int
    """Requests kept open; 0: they arrive at `rate`."""
    rate: float
    """Arrivals a second, on average."""
    requests: int | None
    """How many to send; None: as many as fit in the time."""
    timeout_s: float
    """What a request gets to be answered in."""
    seed: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker has read its work and waits for a `Begin`."""


class Begin(msgspec.Struct, frozen=True):
    """When to send the first request, and what is measured: from `measure_from` to `end`."""

    start: float
    measure_from: float
    end: float


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """All that ended until now, measured or not."""

    answers: int
    failures: int
    tokens: int


class Sums(msgspec.Struct):
    """Answers, all together."""

    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    """From each one's request to its end."""
    deliveries: int = 0


class Records(msgspec.Struct, frozen=True, kw_only=True, tag="records"):
    """What ended in the measured time, and what `server.bench.window` needs to know of the rest.

    Arrays are of float64, an item an answer, seconds where nothing else is said.
    """

    ended: bytes
    """Moments."""
    end_to_end: bytes
    first_token: bytes
    """NaN for an answer without text, or not streamed."""
    last_token: bytes
    """From the first delivery to the last; NaN likewise."""
    prompt_tokens: bytes
    output_tokens: bytes
    delivered: bytes
    """Deliveries; 0 for an answer without text, or not streamed."""
    delivered_inside: bytes
    """Those in the measured time."""
    gaps: bytes
    """Between any two deliveries of an answer, of all answers."""
    failed_after: bytes
    """Of each failed request, from its sending on."""
    errors: dict[str, int]
    """Failed requests by what went wrong."""
    earlier: Sums
    """Answers that ended before."""
    unfinished: int
    """Requests that were open when the time was over."""
    open_seconds: float
    """How much of the measured time they were open, all together."""
    open_deliveries: int
    """How many deliveries they had in it."""
    cpu_seconds: float
    """Of the worker, all its life."""


FromWorker = Ready | Progress | Records
LENGTH = struct.Struct("<I")


def encode(message: FromWorker) -> bytes:
    """A frame: the length of what follows as four bytes, and the message."""
    data = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(data)) + data
