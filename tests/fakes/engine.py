"""An engine for tests of API processes: takes every request and writes a token at a time, as fast as it is told to."""

import asyncio
from pathlib import Path

from engine.messages import Abort, Accepted, Deltas, EngineHello, FromEngine, Submit, encode_frame, to_engine_reader
from engine.types import Delta, EngineInfo, EngineLoad, GenerationRequest

TOKEN = 70


class FakeEngine:
    """Listens while it is entered. `interval_s` lies between a request's tokens."""

    def __init__(self, path: Path, info: EngineInfo, interval_s: float = 0.0) -> None:
        self.interval_s = interval_s
        self.submitted = 0
        self.aborted: list[int] = []
        self._path = path
        self._info = info
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "FakeEngine":
        self._server = await asyncio.start_unix_server(self._accept, str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(message: FromEngine) -> None:
            if not writer.is_closing():
                writer.write(encode_frame(message))

        send(EngineHello(info=self._info))
        frames = to_engine_reader()
        try:
            while data := await reader.read(1 << 16):
                for message in frames.feed(data):
                    match message:
                        case Submit():
                            self.submitted += len(message.requests)
                            send(Accepted(group_id=message.group_id))
                            for score in message.scores:
                                ended = Delta(request_id=score.request_id, finish_reason="length")
                                send(Deltas(deltas=[ended], load=EngineLoad()))
                            for request in message.requests:
                                self._start(asyncio.create_task(self._write(request, writer)))
                        case Abort():
                            self.aborted += message.request_ids
        finally:
            writer.close()

    async def _write(self, request: GenerationRequest, writer: asyncio.StreamWriter) -> None:
        for number in range(1, request.params.max_tokens + 1):
            await asyncio.sleep(self.interval_s)
            last = number == request.params.max_tokens
            delta = Delta(request_id=request.request_id, token_ids=(TOKEN,), finish_reason="length" if last else None)
            if writer.is_closing() or request.request_id in self.aborted:
                return
            writer.write(encode_frame(Deltas(deltas=[delta], load=EngineLoad(running=1))))
