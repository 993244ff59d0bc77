"""The clients that misbehave do so where they say, and what they would leave behind is seen."""

import asyncio
import os
from pathlib import Path

import pytest

from benchmarks.hostile_clients import STAGES, beside, descriptors, parse, request, scenarios, silent, vanish
from server.bench.http_client import Address


class Listener:
    """Answers every request with the beginning of a stream, and keeps what each connection sent."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.open = 0
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place, data = len(self.heard), b""
        self.heard.append(data)
        self.open += 1
        try:
            while more := await reader.read(1 << 16):
                self.heard[place] += more
                if self.heard[place].endswith(b"}"):
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: {")
        except OSError:
            pass
        self.open -= 1
        self.ended.set()
        writer.close()


@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_vanishes_at_its_stage(stage: str) -> None:
    listener = Listener()
    async with await asyncio.start_server(listener.serve, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        data = request(address, 256, 128)
        task = asyncio.create_task(vanish(address, data, stage))
        await asyncio.wait_for(listener.ended.wait(), 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    head, _, body = data.partition(b"\r\n\r\n")
    sent = len(listener.heard[0]) - len(head) - 4
    assert (sent == 0, 0 < sent < len(body), sent == len(body)) == {
        "before the body": (True, False, False),
        "within the body": (False, True, False),
    }.get(stage, (False, False, True))


async def test_silent_connections_come_and_go() -> None:
    listener = Listener()
    async with await asyncio.start_server(listener.serve, "127.0.0.1", 0) as server:
        async with silent(Address("127.0.0.1", server.sockets[0].getsockname()[1]), 5):
            async with asyncio.timeout(5):
                while listener.open < 5:
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            while listener.open:
                await asyncio.sleep(0.001)
    assert listener.heard == [b""] * 5


async def test_a_hostile_client_that_fails_is_no_measurement() -> None:
    nobody = Address("127.0.0.1", 1)
    with pytest.raises(ConnectionRefusedError):
        async with beside(("vanishing",), nobody, request(nobody, 256, 128), 0):
            await asyncio.sleep(0.05)


def test_everybody_is_measured_alone_and_together() -> None:
    assert scenarios(parse([]).kinds) == [
        (),
        ("slow reader",),
        ("idle",),
        ("vanishing",),
        ("slow reader", "idle", "vanishing"),
    ]
    assert scenarios(["idle"]) == [(), ("idle",)]


def test_an_open_descriptor_counts(tmp_path: Path) -> None:
    before = descriptors(os.getpid())
    with (tmp_path / "file").open("w"):
        assert descriptors(os.getpid()) == before + 1
