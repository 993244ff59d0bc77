"""Messages between processes: length-prefixed msgpack frames over AF_UNIX streams.

A frame is a 4-byte big-endian length and a msgpack body. Bodies are tagged unions of msgspec structs, so a frame that
is not one of the expected messages raises `ProtocolError`; whoever reads it closes that connection and nothing else.
End of file on a connection means that the peer died.
"""

import struct
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar

import msgspec

from engine.types import Delta, EngineInfo, EngineLoad, GenerationRequest, RejectCode, ScoreRequest, unpack_tokens

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """Bytes that are not a message of the expected kind. The connection they came from cannot be read further."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# --- API process -> engine process -------------------------------------------------------------------------------


class Submit(_Message, frozen=True, kw_only=True):
    """Take all of these requests, or none. Answered by Accepted or Rejected with the same group id."""

    group_id: int
    requests: list[GenerationRequest]
    scores: list[ScoreRequest] = []


class Abort(_Message, frozen=True, kw_only=True):
    """Forget these requests. Unknown ids are ignored: the answer may be on its way already. No delta follows."""

    request_ids: list[int]


# --- engine process -> API process -------------------------------------------------------------------------------


class EngineHello(_Message, frozen=True, kw_only=True):
    """First message on every connection."""

    info: EngineInfo


class Accepted(_Message, frozen=True, kw_only=True):
    """The engine owns every request of the group from now on."""

    group_id: int


class Rejected(_Message, frozen=True, kw_only=True):
    """The engine took nothing of the group. `param` names the field at fault where `code` is "invalid"."""

    group_id: int
    code: RejectCode
    message: str
    param: str | None = None


class Deltas(_Message, frozen=True, kw_only=True):
    """All that one step did for one API process, and the load after it (also sent alone when only the load changed).

    Most of a step is requests that gained a whole block and go on: those come packed, the others as `deltas`.
    """

    deltas: list[Delta]
    request_ids: list[int] = []
    """Requests that gained a block."""
    blocks: bytes = b""
    """Their tokens, all of the same number, one request's behind the other's, packed by `engine.types.pack_tokens`."""
    load: EngineLoad

    def unpacked(self) -> list[Delta]:
        """Every delta. Raises ValueError where the blocks are not those of the requests."""
        if not self.request_ids:
            return self.deltas
        token_ids, number = unpack_tokens(self.blocks), len(self.request_ids)
        length, rest = divmod(len(token_ids), number)
        if rest:
            raise ValueError(f"{len(token_ids)} tokens are not whole blocks of {number} requests")
        starts = range(0, len(token_ids), length)
        return self.deltas + [
            Delta(request_id=request_id, token_ids=token_ids[start : start + length])
            for request_id, start in zip(self.request_ids, starts, strict=True)
        ]


# --- any child -> supervisor -------------------------------------------------------------------------------------


class ChildHello(_Message, frozen=True, kw_only=True):
    """First message on every control connection: who is speaking."""

    role: Literal["engine", "api"]
    index: int
    pid: int


class ChildReady(_Message, frozen=True, kw_only=True):
    """The child can do its work. `info` comes from engine processes."""

    info: EngineInfo | None = None


class ChildFailed(_Message, frozen=True, kw_only=True):
    """The child cannot start, and trying again would not help (a bad model directory, no such device)."""

    message: str


class EngineStatus(_Message, frozen=True, kw_only=True):
    """A sign of life from an engine. `step_started` is the wall-clock second its step in flight began, if any."""

    step_started: float | None
    last_step: float


class MetricsIncrement(_Message, frozen=True, kw_only=True):
    """What a process counted since it last sent. Series keys are (metric name, label values in declared order)."""

    counters: list[tuple[str, tuple[str, ...], float]] = []
    histograms: list[tuple[str, tuple[str, ...], list[int], float]] = []
    """Per series: observations that fell into each bucket (not cumulative; the last is +Inf) and their sum."""
    gauges: list[tuple[str, tuple[str, ...], float]] = []


class RenderMetrics(_Message, frozen=True, kw_only=True):
    """Ask for the registry's text. `openmetrics` chooses the exposition format."""

    render_id: int
    openmetrics: bool


# --- supervisor -> any child -------------------------------------------------------------------------------------


class MetricsText(_Message, frozen=True, kw_only=True):
    """Answer to RenderMetrics."""

    render_id: int
    content_type: str
    body: bytes


class ServiceState(_Message, frozen=True, kw_only=True):
    """What /health and /ready answer from: sent on connection and at every change."""

    healthy: bool
    engines_up: int
    draining: bool
    detail: str = ""


class Shutdown(_Message, frozen=True, kw_only=True):
    """Finish what is open within `deadline_s` seconds, then exit."""

    deadline_s: float


ToEngine = Submit | Abort
FromEngine = EngineHello | Accepted | Rejected | Deltas
ToSupervisor = ChildHello | ChildReady | ChildFailed | EngineStatus | MetricsIncrement | RenderMetrics
FromSupervisor = MetricsText | ServiceState | Shutdown
AnyMessage = ToEngine | FromEngine | ToSupervisor | FromSupervisor

M = TypeVar("M")
_ENCODER = msgspec.msgpack.Encoder()


def encode_frame(message: AnyMessage) -> bytes:
    """The message as one frame, ready to be written."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[M]):
    """Turns the bytes of one connection back into messages, however the stream happened to be cut."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M], max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder = decoder
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """Yield every message that `data` completes.

        Raises ProtocolError for a frame that is too long or not a message; the reader is of no use after that.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_frame_bytes:
                raise ProtocolError(f"a frame of {length} bytes exceeds the limit of {self._max_frame_bytes}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = self._decoder.decode(body)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise ProtocolError(f"not a message: {error}") from error
            yield message


def to_engine_reader() -> FrameReader[ToEngine]:
    """Reads what API processes send to an engine."""
    return FrameReader(msgspec.msgpack.Decoder(ToEngine))


def from_engine_reader() -> FrameReader[FromEngine]:
    """Reads what an engine sends to an API process."""
    return FrameReader(msgspec.msgpack.Decoder(FromEngine))


def to_supervisor_reader() -> FrameReader[ToSupervisor]:
    """Reads what children send to the supervisor."""
    return FrameReader(msgspec.msgpack.Decoder(ToSupervisor))


def from_supervisor_reader() -> FrameReader[FromSupervisor]:
    """Reads what the supervisor sends to its children."""
    return FrameReader(msgspec.msgpack.Decoder(FromSupervisor))
