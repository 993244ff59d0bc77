"""An engine process that computes nothing: it takes every request and answers with random blocks as fast as it is read.

`python -m benchmarks.canned_engine CONFIG`, an EngineProcessConfig as JSON, in place of `engine.worker`. It sends what
a real engine would: one message a step for each API process, with a block for each of its open requests. A step begins
once the peer has taken the one before, so the front end alone is measured.
"""

import asyncio
import random
import sys
from pathlib import Path

import uvloop

from engine.config import ModelConfig
from engine.control import ControlChannel, become_child
from engine.messages import (
    Abort,
    Accepted,
    ChildReady,
    Deltas,
    EngineHello,
    Shutdown,
    Submit,
    encode_frame,
    to_engine_reader,
)
from engine.process_config import EngineProcessConfig, read_process_config
from engine.types import Delta, EngineInfo, EngineLoad, Timing

READ_BYTES = 1 << 18
BLOCKS = 4093
"""Different blocks there are; prime, so that answers of any length differ."""


class Peer:
    """One API process and its open requests."""

    def __init__(self, writer: asyncio.StreamWriter, blocks: list[tuple[int, ...]]) -> None:
        self._writer = writer
        self._blocks = blocks
        self._place = 0
        self._begun: set[int] = set()
        self._left: dict[int, int] = {}
        """Tokens that each open request still gets."""
        self._work = asyncio.Event()
        # So that `drain` waits until the kernel has it all.
        writer.transport.set_write_buffer_limits(high=0)

    def handle(self, message: Submit | Abort) -> None:
        """Take requests, or forget them."""
        if isinstance(message, Submit):
            self._writer.write(encode_frame(Accepted(group_id=message.group_id)))
            self._left.update((request.request_id, request.params.max_tokens) for request in message.requests)
            self._work.set()
        else:
            for request_id in message.request_ids:
                self._left.pop(request_id, None)
                self._begun.discard(request_id)

    async def run(self) -> None:
        """Step for ever."""
        while True:
            await self._work.wait()
            deltas = [self._delta(request_id, left) for request_id, left in list(self._left.items())]
            if not self._left:
                self._work.clear()
            self._writer.write(encode_frame(Deltas(deltas=deltas, load=EngineLoad(running=len(self._left)))))
            await self._writer.drain()
            # Messages that came meanwhile are for the next step.
            await asyncio.sleep(0)

    def _delta(self, request_id: int, left: int) -> Delta:
        self._place = (self._place + 1) % len(self._blocks)
        block = self._blocks[self._place]
        timing = None
        if request_id not in self._begun:
            self._begun.add(request_id)
            timing = Timing(0.0, 0.0)
        if left > len(block):
            self._left[request_id] = left - len(block)
            return Delta(request_id=request_id, token_ids=block, timing=timing)
        del self._left[request_id]
        self._begun.discard(request_id)
        return Delta(request_id=request_id, token_ids=block[:left], finish_reason="length", timing=timing)


def canned_info(config: EngineProcessConfig) -> EngineInfo:
    """What it says it serves."""
    model = ModelConfig.load(Path(config.model))
    return EngineInfo(
        model=config.name,
        vocab_size=model.vocab_size,
        block_length=model.block_length,
        max_length=model.max_length,
        eos_token_id=model.eos_token_id,
        device="canned",
        dtype="none",
        max_rows=4096,
        pages=1,
        page_size=1,
        kv_bytes=1,
        parameters=1,
    )


async def run(config: EngineProcessConfig) -> None:
    """Serve until a Shutdown message."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    info = canned_info(config)
    rng = random.Random(0)
    blocks = [tuple(rng.randrange(1, info.vocab_size) for _ in range(info.block_length)) for _ in range(BLOCKS)]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(EngineHello(info=info)))
        peer = Peer(writer, blocks)
        stepping = asyncio.create_task(peer.run())
        frames = to_engine_reader()
        try:
            while data := await reader.read(READ_BYTES):
                for message in frames.feed(data):
                    peer.handle(message)
        except OSError:
            pass
        finally:
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)
            writer.close()

    def on_message() -> None:
        if any(isinstance(message, Shutdown) for message in control.poll()):
            loop.call_soon_threadsafe(stop.set)

    control = ControlChannel.connect(Path(config.control_path), "engine", config.index, on_message=on_message)
    async with await asyncio.start_unix_server(serve, config.socket_path):
        control.send(ChildReady(info=info))
        await stop.wait()
        control.close()


def main() -> None:
    """Run the process."""
    become_child()
    uvloop.run(run(read_process_config(Path(sys.argv[1]), EngineProcessConfig)))


if __name__ == "__main__":
    main()
