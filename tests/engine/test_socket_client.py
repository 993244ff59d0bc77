"""SocketEngineClient against a MessageListener, both real, over a real socket."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from engine.client import EngineRejectedError, EngineUnavailableError
from engine.listener import Connected, Disconnected, MessageListener
from engine.messages import Abort, Accepted, Deltas, EngineHello, Rejected, Submit, ToEngine, encode_frame
from engine.metrics import MetricsRecorder
from engine.socket_client import SocketAnswers, SocketEngineClient, _Connection
from engine.types import (
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationRequest,
    SamplingParams,
    ScoreRequest,
    TokenLogprobs,
    pack_tokens,
)

INFO = EngineInfo(
    model="m", vocab_size=512, block_length=4, max_length=128, eos_token_id=0, device="cpu", dtype="float32",
    max_rows=4, pages=8, page_size=8, kv_bytes=1024, parameters=1,
)  # fmt: skip


class ScriptedEngine:
    """The engine's end of the connection: what came, and a way to answer."""

    def __init__(self, path: Path) -> None:
        self.listener = MessageListener()
        self.listener.listen(path)
        self.received: list[tuple[int, ToEngine | Connected | Disconnected]] = []
        self.task = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        while True:
            for peer_id, message in self.listener.poll(0):
                self.received.append((peer_id, message))
                if isinstance(message, Connected):
                    self.listener.send(peer_id, EngineHello(info=INFO))
            await asyncio.sleep(0.001)

    async def next(
        self, kind: type[ToEngine | Connected | Disconnected]
    ) -> tuple[int, ToEngine | Connected | Disconnected]:
        """Wait for the next message of a kind, dropping others."""
        async with asyncio.timeout(5):
            while True:
                while self.received:
                    item = self.received.pop(0)
                    if isinstance(item[1], kind):
                        return item
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        """Die."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.listener.close()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[SocketEngineClient]:
    """A client of an engine that is not there yet."""
    client = SocketEngineClient([tmp_path / "engine.sock"], MetricsRecorder(lambda _: None))
    client.start()
    yield client
    await client.close()


@pytest.fixture
async def engine(tmp_path: Path, client: SocketEngineClient) -> AsyncIterator[ScriptedEngine]:
    """The engine, once the client has its greeting."""
    engine = ScriptedEngine(tmp_path / "engine.sock")
    await until_up(client)
    yield engine
    await engine.close()


async def until_up(client: SocketEngineClient) -> None:
    """Wait for the greeting."""
    async with asyncio.timeout(5):
        while client.info is None:
            await asyncio.sleep(0.001)


def requests(client: SocketEngineClient, count: int = 1) -> list[GenerationRequest]:
    """Requests with fresh ids."""
    return [
        GenerationRequest.of(
            request_id=client.next_request_id(), prompt_token_ids=(1, 2), params=SamplingParams(seed=0)
        )
        for _ in range(count)
    ]


async def accept(engine: ScriptedEngine) -> tuple[int, Submit]:
    """Accept the next group."""
    peer_id, submit = await engine.next(Submit)
    assert isinstance(submit, Submit)
    engine.listener.send(peer_id, Accepted(group_id=submit.group_id))
    return peer_id, submit


async def test_no_engine_is_unavailable(client: SocketEngineClient) -> None:
    with pytest.raises(EngineUnavailableError, match="no engine is ready"):
        await client.submit(requests(client))


async def test_deltas_of_a_group_arrive_together_and_end(client: SocketEngineClient, engine: ScriptedEngine) -> None:
    group = requests(client, 2)
    submitted = asyncio.create_task(client.submit(group))
    peer_id, submit = await accept(engine)
    assert submit.requests == group
    answers = await submitted
    first, second = (request.request_id for request in group)
    step = [Delta(request_id=first, token_ids=(5,)), Delta(request_id=second, token_ids=(6,), finish_reason="length")]
    engine.listener.send(peer_id, Deltas(deltas=[*step, Delta(request_id=999)], load=EngineLoad()))
    last = [Delta(request_id=first, token_ids=(7,), finish_reason="stop")]
    engine.listener.send(peer_id, Deltas(deltas=last, load=EngineLoad()))
    assert [deltas async for deltas in answers.deltas()] == [step, last]


async def test_rejection_carries_the_reason(client: SocketEngineClient, engine: ScriptedEngine) -> None:
    submitted = asyncio.create_task(client.submit(requests(client)))
    peer_id, submit = await engine.next(Submit)
    assert isinstance(submit, Submit)
    engine.listener.send(peer_id, Rejected(group_id=submit.group_id, code="invalid", message="no", param="prompt"))
    with pytest.raises(EngineRejectedError) as caught:
        await submitted
    assert (caught.value.code, caught.value.message, caught.value.param) == ("invalid", "no", "prompt")


async def test_abort_reaches_the_engine_and_ends_the_answer(client: SocketEngineClient, engine: ScriptedEngine) -> None:
    group = requests(client, 2)
    submitted = asyncio.create_task(client.submit(group))
    await accept(engine)
    answers = await submitted
    reading = asyncio.create_task(_collect(answers.deltas()))
    await asyncio.sleep(0)
    answers.abort([group[0].request_id])
    _, aborted = await engine.next(Abort)
    assert aborted == Abort(request_ids=[group[0].request_id])
    answers.abort()
    _, aborted = await engine.next(Abort)
    assert aborted == Abort(request_ids=[group[1].request_id])
    assert await asyncio.wait_for(reading, 5) == []
    answers.abort()
    await asyncio.sleep(0.02)
    assert not [message for _, message in engine.received if isinstance(message, Abort)]


async def test_a_cancelled_submit_aborts(client: SocketEngineClient, engine: ScriptedEngine) -> None:
    group = requests(client)
    submitted = asyncio.create_task(client.submit(group))
    await engine.next(Submit)
    submitted.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitted
    _, aborted = await engine.next(Abort)
    assert aborted == Abort(request_ids=[group[0].request_id])


async def test_engine_death_fails_open_answers_and_a_new_engine_serves(
    client: SocketEngineClient, engine: ScriptedEngine, tmp_path: Path
) -> None:
    submitted = asyncio.create_task(client.submit(requests(client)))
    await accept(engine)
    answers = await submitted
    waiting = asyncio.create_task(client.submit(requests(client)))
    await engine.next(Submit)
    await engine.close()
    with pytest.raises(EngineUnavailableError, match="has stopped"):
        await _collect(answers.deltas())
    with pytest.raises(EngineUnavailableError, match="has stopped"):
        await waiting
    with pytest.raises(EngineUnavailableError, match="no engine is ready"):
        await client.submit(requests(client))
    reborn = ScriptedEngine(tmp_path / "engine.sock")
    try:
        await reborn.next(Connected)
        async with asyncio.timeout(5):
            while True:
                # Left alone, it would take the message of the next try.
                accepting = asyncio.create_task(accept(reborn))
                try:
                    await client.submit(requests(client))
                    await accepting
                    break
                except EngineUnavailableError:
                    accepting.cancel()
                    await asyncio.sleep(0.01)
    finally:
        await reborn.close()


async def test_a_reader_that_stays_behind_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("engine.socket_client.monotonic", lambda: now)
    told: list[float] = []
    answers = SocketAnswers(_Connection(tmp_path / "nobody"), [1])
    answers.limit_unread(3, lambda: told.append(now))
    step = [Delta(request_id=1, token_ids=(5,))]
    for _ in range(10):  # as many as may come at once after this process was held up
        answers.deliver(step)
    taking = answers.deltas()
    for _ in range(10):
        assert await anext(taking) == step
    now = 102.0
    for _ in range(4):
        answers.deliver(step)
    now = 102.9
    answers.deliver(step)
    assert told == []
    now = 103.0
    answers.deliver(step)
    answers.deliver(step)
    assert told == [103.0]


async def _collect(deltas: AsyncIterator[list[Delta]]) -> list[list[Delta]]:
    return [item async for item in deltas]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[MessageListener]:
    """A listener on tmp_path/"l"."""
    listener = MessageListener()
    listener.listen(tmp_path / "l")
    yield listener
    listener.close()


def connect(path: Path) -> socket.socket:
    """A raw connection."""
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(str(path))
    return stream


def test_garbage_closes_that_connection_only(listener: MessageListener, tmp_path: Path) -> None:
    bad, good = connect(tmp_path / "l"), connect(tmp_path / "l")
    with bad, good:
        assert [type(message) for _, message in listener.poll(1)] == [Connected, Connected]
        bad.sendall(b"\x00\x00\x00\x04nope")
        assert [(peer, type(message)) for peer, message in listener.poll(1)] == [(0, Disconnected)]
        good.sendall(encode_frame(Abort(request_ids=[3])))
        assert list(listener.poll(1)) == [(1, Abort(request_ids=[3]))]
        assert bad.recv(10) == b""
        assert listener.peers == [1]


def test_a_peer_that_is_gone_is_reported_once(listener: MessageListener, tmp_path: Path) -> None:
    with connect(tmp_path / "l"):
        list(listener.poll(1))
    for _ in range(3):
        listener.send(0, Accepted(group_id=0))
    events = [type(message) for _ in range(3) for _, message in listener.poll(0.01)]
    assert events == [Disconnected]
    assert listener.peers == []


def test_a_peer_that_does_not_read_is_buffered_and_gets_everything(listener: MessageListener, tmp_path: Path) -> None:
    with connect(tmp_path / "l") as slow:
        list(listener.poll(1))
        frame = encode_frame(Rejected(group_id=1, code="invalid", message="x" * 100_000))
        for _ in range(20):
            listener.send(0, Rejected(group_id=1, code="invalid", message="x" * 100_000))
        received = bytearray()
        while len(received) < 20 * len(frame):
            list(listener.poll(0))
            received += slow.recv(1 << 16)
        assert bytes(received) == frame * 20


def test_wake_ends_a_wait(listener: MessageListener) -> None:
    listener.wake()
    assert list(listener.poll(None)) == []


def test_a_socket_file_left_behind_is_replaced(listener: MessageListener, tmp_path: Path) -> None:
    successor = MessageListener()
    successor.listen(tmp_path / "l")
    with connect(tmp_path / "l"):
        assert [type(message) for _, message in successor.poll(1)] == [Connected]
    successor.close()


async def test_the_load_is_what_all_engines_said_last(tmp_path: Path) -> None:
    client = SocketEngineClient([tmp_path / "engine.sock", tmp_path / "engine1.sock"], MetricsRecorder(lambda _: None))
    client.start()
    engines = [ScriptedEngine(tmp_path / "engine.sock"), ScriptedEngine(tmp_path / "engine1.sock")]
    try:
        assert client.load == EngineLoad()
        for engine, load in zip(engines, (EngineLoad(running=2, waiting=1), EngineLoad(running=5)), strict=True):
            peer_id, _ = await engine.next(Connected)
            engine.listener.send(peer_id, Deltas(deltas=[], load=load))
        async with asyncio.timeout(5):
            while client.load != EngineLoad(running=7, waiting=1):
                await asyncio.sleep(0.001)
        await engines.pop().close()
        async with asyncio.timeout(5):
            while client.load != EngineLoad(running=2, waiting=1):
                await asyncio.sleep(0.001)
    finally:
        for engine in engines:
            await engine.close()
        await client.close()


async def test_a_burst_is_spread_and_a_full_engine_leaves_its_requests_to_another(tmp_path: Path) -> None:
    client = SocketEngineClient([tmp_path / "engine.sock", tmp_path / "engine1.sock"], MetricsRecorder(lambda _: None))
    client.start()
    engines = [ScriptedEngine(tmp_path / "engine.sock"), ScriptedEngine(tmp_path / "engine1.sock")]
    try:
        for engine in engines:
            peer_id, _ = await engine.next(Connected)
            engine.listener.send(peer_id, Deltas(deltas=[], load=EngineLoad(pages_used=1)))
        async with asyncio.timeout(5):
            while client.load.pages_used < 2:
                await asyncio.sleep(0.001)
        burst = [asyncio.create_task(client.submit(requests(client))) for _ in range(4)]
        await asyncio.sleep(0)
        for engine in engines:
            await accept(engine)
            await accept(engine)
        await asyncio.gather(*burst)
        last = asyncio.create_task(client.submit(requests(client)))
        peer_id, submit = await engines[0].next(Submit)
        assert isinstance(submit, Submit)
        engines[0].listener.send(peer_id, Rejected(group_id=submit.group_id, code="queue_full", message="full"))
        _, again = await accept(engines[1])
        assert again.requests == submit.requests
        await last
        refused = asyncio.create_task(client.submit(requests(client)))
        for engine in (engines[0], engines[1]):
            peer_id, submit = await engine.next(Submit)
            assert isinstance(submit, Submit)
            engine.listener.send(peer_id, Rejected(group_id=submit.group_id, code="queue_full", message="full"))
        with pytest.raises(EngineRejectedError, match="full"):
            await refused
    finally:
        for engine in engines:
            await engine.close()
        await client.close()


async def test_scores_are_part_of_a_group(client: SocketEngineClient, engine: ScriptedEngine) -> None:
    score = ScoreRequest(request_id=client.next_request_id(), text=pack_tokens((1, 2, 3)))
    submitting = asyncio.create_task(client.submit(requests(client), [score]))
    peer_id, message = await engine.next(Submit)
    assert isinstance(message, Submit)
    assert message.scores == [score]
    engine.listener.send(peer_id, Accepted(group_id=message.group_id))
    answers = await submitting
    told = Delta(request_id=score.request_id, finish_reason="length", logprobs=(TokenLogprobs(-1.5), TokenLogprobs(-2)))
    ended = Delta(request_id=message.requests[0].request_id, finish_reason="length")
    engine.listener.send(peer_id, Deltas(deltas=[told], load=EngineLoad()))
    engine.listener.send(peer_id, Deltas(deltas=[ended], load=EngineLoad()))
    assert [delta async for step in answers.deltas() for delta in step] == [told, ended]


async def test_a_group_may_be_scores_alone(client: SocketEngineClient, engine: ScriptedEngine) -> None:
    score = ScoreRequest(request_id=client.next_request_id(), text=pack_tokens((1, 2, 3)))
    submitting = asyncio.create_task(client.submit([], [score]))
    peer_id, message = await engine.next(Submit)
    assert isinstance(message, Submit)
    assert (message.requests, message.scores) == ([], [score])
    engine.listener.send(peer_id, Accepted(group_id=message.group_id))
    await submitting
