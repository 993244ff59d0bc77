"""Whatever arrives on a connection is answered, or closes that connection, and harms nobody else."""

import struct
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Accepted, EngineHello, ProtocolError, Rejected, Shutdown, Submit, to_engine_reader
from engine.types import EngineLoad, GenerationRequest, SamplingParams, pack_tokens
from tests.engine.helpers import GoldenModel
from tests.engine.worker_bench import Peer, WorkerBench, worker_bench

MODEL = GoldenModel("lookup_prefix2")
GOOD = GenerationRequest.of(
    request_id=1,
    prompt_token_ids=tuple(range(30, 50)),
    params=SamplingParams(max_tokens=40, temperature=0, seed=0, ignore_eos=True),
)
"""What the well-behaved peer asks for, under an id that others use as well."""

WRONG: dict[type, list[Any]] = {
    int: [-1, 0, 512, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**31) - 1, -(2**63)],
    float: [-1, 3.0, float("nan"), float("inf"), -float("inf"), -0.0, 1e308],
    list: [[], [-1], [512], [2**63], [1] * 200],
}
"""Values that are at fault although they are of the right type."""
NONSENSE: list[Any] = [None, True, 7, 0.5, "", "x" * 300, b"\xff", {}, [None], [[]], ["\ud7ff"]]

PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 24),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 600),
    "min_p": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=2),
    "stop_token_ids": st.lists(st.integers(0, 511), max_size=3),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 1),
}


@st.composite
def fields(draw: st.DrawFn, sound: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """Sound values for every field; now and then one is wrong, and rarely it is nonsense, missing or unknown."""
    values = {name: draw(strategy) for name, strategy in sound.items()}
    defect = draw(st.integers(0, 39))
    name = draw(st.sampled_from([*sound, "unknown"]))
    if defect == 0:
        values[name] = draw(st.sampled_from(NONSENSE))
    elif defect == 1:
        values.pop(name, None)
    elif defect < 5:
        values[name] = draw(st.sampled_from(WRONG.get(type(values.get(name)), NONSENSE)))
    return values


REQUEST = fields(
    {
        "request_id": st.integers(0, 20),
        "prompt": st.lists(st.integers(0, 511), min_size=1, max_size=40).map(pack_tokens) | st.binary(max_size=9),
        "params": fields(PARAMS),
        "priority": st.integers(-2, 2),
    }
)
MESSAGE = st.one_of(
    fields(
        {
            "type": st.just("Submit"),
            "group_id": st.integers(0, 9),
            "requests": st.lists(REQUEST, min_size=1, max_size=5),
        }
    ),
    fields({"type": st.just("Abort"), "request_ids": st.lists(st.integers(-1, 20), max_size=9)}),
)


def frame(body: bytes) -> bytes:
    """A body with its length in front."""
    return struct.pack(">I", len(body)) + body


FRAME = MESSAGE.map(lambda message: frame(msgspec.msgpack.encode(message)))
BYTES = st.one_of(
    *[FRAME] * 20,
    st.binary(max_size=40),
    st.binary(max_size=40).map(frame),
    st.sampled_from([EngineHello, Shutdown, Accepted]).map(
        lambda kind: frame(msgspec.msgpack.encode({"type": kind.__name__}))
    ),
    st.tuples(FRAME, st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]]),
    st.integers(0, 2**32 - 1).map(lambda length: struct.pack(">I", length)),
)
"""What is sent at a time: mostly messages, sound ones and others; else garbage, cut frames and lengths of nothing."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerBench]:
    """One worker for all examples: nothing may be left of any of them."""
    core = MODEL.core(max_rows=3, max_waiting=2, page_size=8, max_step_positions=16, kv_bytes=9 * MODEL.page_bytes)
    with worker_bench(core, tmp_path_factory.mktemp("fuzz")) as made:
        yield made


@cache
def expected() -> list[int]:
    """The oracle's answer to the well-behaved peer."""
    return list(MODEL.oracle(GOOD).token_ids)


def check_answers(peer: Peer, sent: bytes, seen: Counter[str]) -> None:
    """Every Submit in what was sent has an answer, in order, up to where the bytes are no message: there it ends."""
    groups: list[int] = []
    broken = False
    try:
        groups += (message.group_id for message in to_engine_reader().feed(sent) if isinstance(message, Submit))
    except ProtocolError:
        broken = True
    peer.read()
    answers = [message for message in peer.received if isinstance(message, Accepted | Rejected)]
    assert peer.ended == broken
    assert [answer.group_id for answer in answers] == groups[: len(answers)]
    assert broken or len(answers) == len(groups)
    seen.update(answer.code if isinstance(answer, Rejected) else "accepted" for answer in answers)
    seen["broken"] += broken


def check_life(bench: WorkerBench, sends: list[tuple[int, bytes]], seen: Counter[str]) -> None:
    """Send (peer, bytes) after (peer, bytes) beside a request that is open throughout, and hang up."""
    good = bench.connect()
    good.send(Submit(group_id=0, requests=[GOOD]))
    hostile = [bench.connect() for _ in range(3)]
    bench.turn_until(lambda: bool(good.of_kind(Accepted)))
    sent = [b"", b"", b""]
    for number, data in sends:
        hostile[number].send(data)
        sent[number] += data
        bench.worker.turn(0.0)
        bench.core.check_integrity()
    for peer, data in zip(hostile, sent, strict=True):
        check_answers(peer, data, seen)
        peer.close()
    bench.turn_until(lambda: len(bench.listener.peers) == 1, timeout=5)
    load = bench.core.load_now
    assert load.running + load.waiting == (not good.finished(GOOD.request_id)), "who has left holds something"
    bench.core.check_integrity()
    bench.turn_until(lambda: good.finished(GOOD.request_id), timeout=5)
    assert good.tokens(GOOD.request_id) == expected()
    good.close()
    bench.turn_until(lambda: not bench.listener.peers, timeout=5)
    assert bench.core.load_now == EngineLoad()
    bench.core.check_integrity()


def test_any_bytes_are_answered_or_close_their_connection_alone(bench: WorkerBench) -> None:
    seen: Counter[str] = Counter()

    @given(st.lists(st.tuples(st.integers(0, 2), BYTES), min_size=2, max_size=12))
    @settings(max_examples=60, deadline=None)
    def check(sends: list[tuple[int, bytes]]) -> None:
        check_life(bench, sends, seen)

    check()
    assert {"accepted", "invalid", "broken"} <= seen.keys(), seen
