"""Worker processes: starts them, lets them begin at the same moment, and collects what they say."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from server.bench.messages import LENGTH, Begin, FromWorker, Progress, Ready, Records, Work
from server.children import child_environment

LEAD_S = 0.2
"""From the order to begin to the first request, so that the order has reached all workers."""
FOREVER_S = 1e8


class WorkerError(Exception):
    """A worker process failed; its own words are on standard error."""


class Workers:
    """Worker processes that have read their work and wait for the order to begin."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes
        self._progress = [Progress(0, 0, 0) for _ in processes]

    async def run(
        self,
        seconds: float | None,
        warm_up: float = 0.0,
        *,
        on_begin: Callable[[Begin], None] = lambda _: None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[Begin, list[Records]]:
        """Load for `warm_up` + `seconds` (None: until all requests are done); what came of the last `seconds`.

        `on_begin` is told the moments beforehand, `on_progress` the sums of all workers now and then. Raises
        WorkerError.
        """
        start = time.monotonic() + LEAD_S
        begin = Begin(start, start + warm_up, start + warm_up + (FOREVER_S if seconds is None else seconds))
        on_begin(begin)
        line = msgspec.json.encode(begin) + b"\n"
        for process in self._processes:
            _send(process, line)
        following = (self._follow(place, on_progress) for place in range(len(self._processes)))
        return begin, list(await asyncio.gather(*following))

    async def _follow(self, place: int, on_progress: Callable[[Progress], None]) -> Records:
        while not isinstance(message := await _read(self._processes[place]), Records):
            if isinstance(message, Progress):
                self._progress[place] = message
                on_progress(
                    Progress(
                        sum(one.answers for one in self._progress),
                        sum(one.failures for one in self._progress),
                        sum(one.tokens for one in self._progress),
                    )
                )
        return message


@contextlib.asynccontextmanager
async def start_workers(works: Sequence[Work]) -> AsyncIterator[Workers]:
    """A process for each piece of work, all of them ready; ended afterwards. Raises WorkerError."""
    async with contextlib.AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(module_process("server.bench.worker")) for _ in works]
        for process, work in zip(processes, works, strict=True):
            _send(process, msgspec.json.encode(work) + b"\n")
        for process in processes:
            if not isinstance(await _read(process), Ready):
                raise WorkerError("a worker did not say that it is ready")
        yield Workers(processes)


@contextlib.asynccontextmanager
async def module_process(module: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m module ARGUMENTS` with pipes; killed afterwards, if it is still there."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
        limit=1 << 20,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # What it still wrote has to be read for its pipe to be closed.
        await process.communicate()


def _send(process: asyncio.subprocess.Process, line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line)


async def _read(process: asyncio.subprocess.Process) -> FromWorker:
    assert process.stdout is not None
    try:
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        data = await process.stdout.readexactly(length)
    except asyncio.IncompleteReadError:
        raise WorkerError("a worker process ended before its work did") from None
    message: FromWorker = msgspec.msgpack.decode(data, type=FromWorker)
    return message
