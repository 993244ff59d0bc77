import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import messages as m
from engine.types import (
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationRequest,
    SamplingParams,
    ScoreRequest,
    Timing,
    TokenLogprobs,
    pack_tokens,
)

INFO = EngineInfo(
    model="m", vocab_size=512, block_length=4, max_length=64, eos_token_id=0, device="cpu", dtype="float32",
    max_rows=4, pages=8, page_size=16, kv_bytes=1, parameters=2,
)  # fmt: skip
REQUEST = GenerationRequest.of(
    request_id=1,
    prompt_token_ids=(1, 2),
    params=SamplingParams(stop=("é",), seed=2**63 - 1, logit_bias=((7, -100), (8, 0.5)), logprobs=2),
)
SCORE = ScoreRequest(request_id=2, text=pack_tokens((1, 2)), top=20)
LOGPROBS = (TokenLogprobs(-math.inf, (3, 4), (-0.5, -math.inf)), TokenLogprobs(-0.1))
DELTA = Delta(
    request_id=1,
    token_ids=(5, 0),
    finish_reason="stop",
    stop_reason=7,
    timing=Timing(queue=0.5, prefill=1.0),
    logprobs=LOGPROBS,
)

TO_ENGINE: list[m.AnyMessage] = [m.Submit(group_id=3, requests=[REQUEST], scores=[SCORE]), m.Abort(request_ids=[1, 2])]
FROM_ENGINE: list[m.AnyMessage] = [
    m.EngineHello(info=INFO),
    m.Accepted(group_id=3),
    m.Rejected(group_id=3, code="invalid", message="no", param="top_p"),
    m.Deltas(deltas=[DELTA], load=EngineLoad(running=1)),
]
TO_SUPERVISOR: list[m.AnyMessage] = [
    m.ChildReady(info=INFO),
    m.ChildFailed(message="no such device"),
    m.EngineStatus(step_started=1.5, last_step=1.0),
    m.MetricsIncrement(counters=[("a", ("x",), 1.0)], histograms=[("b", (), [0, 2], 0.5)], gauges=[("c", (), 1.0)]),
    m.RenderMetrics(render_id=1, openmetrics=True),
]
FROM_SUPERVISOR: list[m.AnyMessage] = [
    m.MetricsText(render_id=1, content_type="text/plain", body=b"\x00\xff"),
    m.ServiceState(healthy=True, engines_up=1, draining=False, detail="é"),
    m.Shutdown(deadline_s=2.0),
]
CHANNELS: list[tuple[Any, list[m.AnyMessage]]] = [
    (m.to_engine_reader, TO_ENGINE),
    (m.from_engine_reader, FROM_ENGINE),
    (m.to_supervisor_reader, TO_SUPERVISOR),
    (m.from_supervisor_reader, FROM_SUPERVISOR),
]


def chop(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(borders)]


@given(st.sampled_from(CHANNELS), st.lists(st.integers(0, 4), max_size=6), st.lists(st.integers(0, 5000), max_size=40))
def test_messages_survive_any_cut_of_the_stream(
    channel: tuple[Any, list[m.AnyMessage]], choice: list[int], cuts: list[int]
) -> None:
    new_reader, known = channel
    sent = [known[index % len(known)] for index in choice]
    reader = new_reader()
    data = b"".join(map(m.encode_frame, sent))
    assert [message for piece in chop(data, cuts) for message in reader.feed(piece)] == sent


@pytest.mark.parametrize(("new_reader", "known"), CHANNELS)
def test_one_byte_at_a_time(new_reader: Any, known: list[m.AnyMessage]) -> None:
    reader = new_reader()
    data = b"".join(map(m.encode_frame, known))
    assert [message for byte in data for message in reader.feed(bytes([byte]))] == known


@pytest.mark.parametrize(("new_reader", "known"), CHANNELS)
def test_messages_of_another_channel_are_refused(new_reader: Any, known: list[m.AnyMessage]) -> None:
    for _, others in CHANNELS:
        for message in others:
            if message not in known:
                with pytest.raises(m.ProtocolError, match="not a message"):
                    list(new_reader().feed(m.encode_frame(message)))


def test_a_frame_over_the_limit_is_refused_before_its_body_comes() -> None:
    with pytest.raises(m.ProtocolError, match="a frame of 67108865 bytes exceeds the limit of 67108864"):
        list(m.to_engine_reader().feed(struct.pack(">I", m.MAX_FRAME_BYTES + 1)))


def test_the_limit_itself_is_allowed() -> None:
    frame = m.encode_frame(m.Abort(request_ids=[1]))
    decoder = msgspec.msgpack.Decoder(m.ToEngine)
    assert list(m.FrameReader(decoder, max_frame_bytes=len(frame) - 4).feed(frame))
    with pytest.raises(m.ProtocolError, match="exceeds the limit"):
        list(m.FrameReader(decoder, max_frame_bytes=len(frame) - 5).feed(frame))


def test_messages_in_front_of_a_bad_frame_still_arrive() -> None:
    good = m.Abort(request_ids=[1])
    stream = m.to_engine_reader().feed(m.encode_frame(good) + b"\x00\x00\x00\x01\xc1")
    assert next(stream) == good
    with pytest.raises(m.ProtocolError):
        next(stream)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Abort"}),
        msgspec.msgpack.encode({"type": "Abort", "request_ids": ["1"]}),
        msgspec.msgpack.encode({"type": "Abort", "request_ids": [1]}) + b"\x00",
        msgspec.msgpack.encode(["Abort", [1]]),
        b"\x91" * 100_000,
    ],
)
def test_a_body_that_is_not_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(m.ProtocolError):
        list(m.to_engine_reader().feed(struct.pack(">I", len(body)) + body))


def test_unknown_sampling_fields_are_refused_rather_than_ignored() -> None:
    params = msgspec.to_builtins(SamplingParams()) | {"penalty": 1.0}
    request = {"request_id": 1, "prompt": b"", "params": params}
    body = msgspec.msgpack.encode({"type": "Submit", "group_id": 1, "requests": [request]})
    with pytest.raises(m.ProtocolError, match="penalty"):
        list(m.to_engine_reader().feed(struct.pack(">I", len(body)) + body))


@given(st.sampled_from(CHANNELS), st.lists(st.binary(max_size=64), max_size=6), st.booleans())
@settings(max_examples=300)
def test_garbage_is_refused_or_incomplete_and_nothing_else(
    channel: tuple[Any, list[m.AnyMessage]], pieces: list[bytes], framed: bool
) -> None:
    reader = channel[0]()
    for piece in pieces:
        try:
            received = list(reader.feed(struct.pack(">I", len(piece)) + piece if framed else piece))
        except m.ProtocolError:
            return
        assert all(isinstance(message, msgspec.Struct) for message in received)


@given(st.sampled_from(CHANNELS), st.integers(0, 4), st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=300)
def test_a_flipped_byte_is_refused_or_another_message(
    channel: tuple[Any, list[m.AnyMessage]], choice: int, place: int, value: int
) -> None:
    new_reader, known = channel
    frame = bytearray(m.encode_frame(known[choice % len(known)]))
    frame[place % len(frame)] = value
    try:
        received = list(new_reader().feed(bytes(frame)))
    except m.ProtocolError:
        return
    assert len(received) <= 1


def test_blocks_come_packed_and_have_to_be_whole() -> None:
    deltas = m.Deltas(
        deltas=[DELTA], request_ids=[7, 9], blocks=pack_tokens([1, 2, 3, 4, 5, 6, 7, 8]), load=EngineLoad()
    )
    assert deltas.unpacked() == [
        DELTA, Delta(request_id=7, token_ids=(1, 2, 3, 4)), Delta(request_id=9, token_ids=(5, 6, 7, 8))
    ]  # fmt: skip
    assert m.Deltas(deltas=[DELTA], load=EngineLoad()).unpacked() == [DELTA]
    with pytest.raises(ValueError, match="3 tokens are not whole blocks of 2 requests"):
        m.Deltas(deltas=[], request_ids=[7, 9], blocks=pack_tokens([1, 2, 3]), load=EngineLoad()).unpacked()
