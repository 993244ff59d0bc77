"""A process that asks: `python -m server.bench.worker`. What it reads and says is in `server.bench.messages`."""

import asyncio
import contextlib
import math
import random
import sys
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
import uvloop

from engine.control import become_child
from server.bench.http_client import HttpConnection, Response, post
from server.bench.messages import Begin, Progress, Ready, Records, Sums, Work, encode
from server.bench.traffic import Traffic, arrivals

PROGRESS_S = 0.25
PAUSE_S = 0.1
"""After a failed request, before a place of the closed loop asks again: a server that refuses is not to be hammered."""
EVENT = b"\ndata: "
DONE = b"data: [DONE]"


class Usage(msgspec.Struct):
    """The tokens of an answer, as the server counted them."""

    prompt_tokens: int
    completion_tokens: int


class Answer(msgspec.Struct):
    """What counts of a response, or of the last JSON event of a stream."""

    usage: Usage | None = None
    error: object = None


class FailedError(Exception):
    """A request without an answer that counts; the message is the kind of failure, one of few."""


def read_usage(response: Response, *, streamed: bool) -> Usage:
    """The tokens of an answer. Raises FailedError if it is none, or cut short, or has no usage."""
    if response.status != 200:
        raise FailedError(f"status {response.status}")
    body = response.body
    if streamed:
        end = body.rfind(DONE)
        if end < 0:
            raise FailedError("stream without its end")
        # JSON has no line breaks of its own, so a text cannot look like the beginning of an event.
        last = body.rfind(EVENT, 0, end)
        body = body[last + len(EVENT) if last >= 0 else len(EVENT) - 1 : end]
    try:
        answer = msgspec.json.decode(body, type=Answer)
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise FailedError("answer that is not understood") from None
    if answer.error is not None:
        raise FailedError("error within the answer")
    if answer.usage is None:
        raise FailedError("answer without usage")
    return answer.usage


class Request:
    """One that is under way."""

    __slots__ = ("began", "connection")

    def __init__(self, began: float) -> None:
        self.began = began
        self.connection: HttpConnection | None = None


class Tally:
    """What came of the requests: all of them for the progress, those that end in the measured time for the records."""

    def __init__(self, begin: Begin, clock: Callable[[], float] = time.monotonic) -> None:
        self._begin = begin
        self._clock = clock
        self.answers = self.failures = self.tokens = 0
        self._open: set[Request] = set()
        self._earlier = Sums()
        self._late = self._open_deliveries = 0
        self._open_seconds = 0.0
        self._errors: Counter[str] = Counter()
        self._ended = array("d")
        self._end_to_end = array("d")
        self._first_token = array("d")
        self._last_token = array("d")
        self._prompt_tokens = array("d")
        self._output_tokens = array("d")
        self._delivered = array("d")
        self._delivered_inside = array("d")
        self._gaps = array("d")
        self._failed_after = array("d")

    def opened(self, began: float) -> Request:
        """A request whose time runs from `began`."""
        request = Request(began)
        self._open.add(request)
        return request

    def answered(self, request: Request, deliveries: Sequence[float], usage: Usage, *, streamed: bool) -> None:
        """The answer to an open request, now."""
        now, began = self._clock(), request.began
        self._open.remove(request)
        self.answers += 1
        self.tokens += usage.completion_tokens
        timed = streamed and bool(deliveries)
        if now < self._begin.measure_from:
            self._earlier.tokens += usage.completion_tokens
            self._earlier.prompt_tokens += usage.prompt_tokens
            self._earlier.seconds += now - began
            self._earlier.deliveries += len(deliveries) if timed else 0
            return
        if now >= self._begin.end:
            self._outlasted(request, deliveries)
            return
        self._ended.append(now)
        self._end_to_end.append(now - began)
        self._first_token.append(deliveries[0] - began if timed else math.nan)
        self._last_token.append(deliveries[-1] - deliveries[0] if timed else math.nan)
        self._prompt_tokens.append(usage.prompt_tokens)
        self._output_tokens.append(usage.completion_tokens)
        self._delivered.append(len(deliveries) if timed else 0)
        self._delivered_inside.append(self._inside(deliveries) if timed else 0)
        if timed:
            self._gaps.extend([after - before for before, after in zip(deliveries, deliveries[1:], strict=False)])

    def failed(self, request: Request, kind: str) -> None:
        """The failure of an open request, now."""
        now = self._clock()
        self._open.remove(request)
        self.failures += 1
        if now >= self._begin.end:
            self._outlasted(request, ())
        elif now >= self._begin.measure_from:
            self._errors[kind] += 1
            self._failed_after.append(now - request.began)

    def _outlasted(self, request: Request, deliveries: Sequence[float]) -> None:
        """A request was not over when the time was, whatever came of it then; it may even have begun behind it."""
        if request.began >= self._begin.end:
            return
        self._late += 1
        self._open_seconds += self._begin.end - max(request.began, self._begin.measure_from)
        self._open_deliveries += self._inside(deliveries)

    def _inside(self, deliveries: Sequence[float]) -> int:
        """How many lie in the measured time."""
        return bisect_left(deliveries, self._begin.end) - bisect_left(deliveries, self._begin.measure_from)

    def progress(self) -> Progress:
        """Until now."""
        return Progress(self.answers, self.failures, self.tokens)

    def records(self) -> Records:
        """All there is to know, at the end. What is open now was so when the time was over."""
        for request in self._open:
            self._outlasted(request, () if request.connection is None else request.connection.deliveries)
        return Records(
            ended=self._ended.tobytes(),
            end_to_end=self._end_to_end.tobytes(),
            first_token=self._first_token.tobytes(),
            last_token=self._last_token.tobytes(),
            prompt_tokens=self._prompt_tokens.tobytes(),
            output_tokens=self._output_tokens.tobytes(),
            delivered=self._delivered.tobytes(),
            delivered_inside=self._delivered_inside.tobytes(),
            gaps=self._gaps.tobytes(),
            failed_after=self._failed_after.tobytes(),
            errors=dict(self._errors),
            earlier=self._earlier,
            unfinished=self._late,
            open_seconds=self._open_seconds,
            open_deliveries=self._open_deliveries,
            cpu_seconds=time.process_time(),
        )


class Asker:
    """Sends the requests of one worker."""

    def __init__(self, work: Work, tally: Tally) -> None:
        self._work = work
        self._tally = tally
        self._rng = random.Random(work.seed)  # noqa: S311 - traffic, no secret
        self._traffic = Traffic(
            work.prompts,
            work.prompt_lengths,
            work.output_lengths,
            vocab_size=work.vocab_size,
            words=work.words,
            rng=self._rng,
        )
        self._head = work.address.head("POST", "/v1/completions", work.headers)
        self._idle: list[HttpConnection] = []
        self._numbers: Iterator[int] = iter(range(work.requests if work.requests is not None else sys.maxsize))

    def _body(self) -> bytes:
        prompt, max_tokens = self._traffic.next()
        fields: dict[str, object] = {"prompt": prompt, "max_tokens": max_tokens, "temperature": self._work.temperature}
        if self._work.model is not None:
            fields["model"] = self._work.model
        if self._work.ignore_eos:
            fields["ignore_eos"] = True
        if self._work.streamed:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return post(self._head, msgspec.json.encode(fields))

    async def _ask(self, body: bytes, began: float) -> bool:
        """One request; whether it was answered. Its time runs from `began`, also if it is sent later."""
        tally, streamed = self._tally, self._work.streamed
        request = tally.opened(began)
        try:
            async with asyncio.timeout(self._work.timeout_s):
                request.connection = connection = await self._connection()
                response = await connection.request(body)
            if connection.usable:
                self._idle.append(connection)
            usage = read_usage(response, streamed=streamed)
        except TimeoutError:
            kind = "timeout"
        except OSError as error:
            kind = "connection refused" if isinstance(error, ConnectionRefusedError) else "connection lost"
        except FailedError as error:
            kind = str(error)
        else:
            tally.answered(request, response.deliveries, usage, streamed=streamed)
            return True
        tally.failed(request, kind)
        return False

    async def _connection(self) -> HttpConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return await HttpConnection.open(self._work.address)

    async def run_closed(self) -> None:
        """Keep `concurrency` requests open."""

        async def keep_asking() -> None:
            for _ in self._numbers:
                body = self._body()
                if not await self._ask(body, time.monotonic()):
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(keep_asking() for _ in range(self._work.concurrency)))

    async def run_open(self, start: float) -> None:
        """Send requests as they arrive, whatever became of those before."""
        asking = set()
        for _, moment in zip(self._numbers, arrivals(self._work.rate, self._rng), strict=False):
            body = self._body()
            # A request that is sent late was wanted in time all the same: the wait is part of its latency.
            due = start + moment
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self._ask(body, due))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.gather(*asking)

    def close(self) -> None:
        """Hang up."""
        for connection in self._idle:
            connection.close()


async def run(work: Work, begin: Begin, send: Callable[[Progress | Records], None]) -> None:
    """Ask from `begin.start` to `begin.end`, or until all requests are done."""
    tally = Tally(begin)
    asker = Asker(work, tally)

    async def report() -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            send(tally.progress())

    await asyncio.sleep(max(0.0, begin.start - time.monotonic()))
    reporting = asyncio.create_task(report())
    asking = asyncio.create_task(asker.run_closed() if work.concurrency else asker.run_open(begin.start))
    await asyncio.wait([asking], timeout=begin.end - time.monotonic())
    records = tally.records()
    for task in (asking, reporting):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    asker.close()
    send(tally.progress())
    send(records)


def main() -> None:
    """Ask, and say what came of it."""
    become_child()
    lines, out = sys.stdin.buffer, sys.stdout.buffer

    def send(message: Ready | Progress | Records) -> None:
        out.write(encode(message))
        out.flush()

    work = msgspec.json.decode(lines.readline(), type=Work)
    send(Ready())
    line = lines.readline()
    if line:  # else whoever started this process is gone
        uvloop.run(run(work, msgspec.json.decode(line, type=Begin), send))


if __name__ == "__main__":
    main()
