"""Lines are answered as HTTP requests are, many at once, and asked again where an engine dies."""

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest

from engine.client import EngineUnavailableError
from server.batch import ask as asking
from server.batch.ask import ATTEMPTS, Answer, ask, ask_until_answered, completion_app
from server.batch.lines import METHOD, URL, BatchRequest, Line
from server.batch.run import LINES_A_ROW, Engines, answer_all
from tests.server.fakes import REPLY, FakeEngine, Harness, reply_deltas, until


@pytest.fixture(autouse=True)
def _patient_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RETRY_S", 0.001)


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Hi", "max_tokens": 100, **fields}).encode()


def lines(number: int) -> Iterator[Line]:
    for place in range(number):
        yield Line(place + 1, BatchRequest(str(place), METHOD, URL, msgspec.Raw(body())))


async def test_the_answer_is_that_of_the_server() -> None:
    harness = Harness(api_key=("sk-1",))
    fields: dict[str, Any] = {"n": 2, "echo": True, "logprobs": 2, "seed": 3}
    answer = await ask(completion_app(harness.state), body(**fields))
    assert answer.status == 200
    ours = json.loads(answer.body)
    assert ours["id"] == f"cmpl-{answer.request_id}"
    # A server asks for its key; whoever runs a batch has the model itself.
    served = (await Harness().complete(max_tokens=100, **fields)).json()
    assert ours["choices"] == served["choices"]
    assert ours["usage"] == served["usage"]
    assert ours["choices"][1]["text"] == "Hi" + REPLY


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stream": True}, "stream"), ({"temperature": 9}, "temperature"), ({"prompt": [[999999]]}, "prompt")],
)
async def test_what_cannot_be_served_is_refused_with_its_field(fields: dict[str, Any], param: str) -> None:
    answer = await ask(completion_app(Harness().state), body(**fields))
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["param"] == param


async def test_a_request_whose_engine_dies_is_asked_again() -> None:
    engine = FakeEngine(script=None)
    harness = Harness(engine)
    answers: list[Answer] = []

    async def run() -> None:
        answers.append(await ask_until_answered(completion_app(harness.state), engine, body()))

    task = asyncio.create_task(run())
    await until(lambda: len(engine.groups) == 1)
    engine.up = False
    engine.die()
    for _ in range(50):
        await asyncio.sleep(0.001)
    # Nothing is asked of engines that are not there.
    assert len(engine.groups) == 1
    engine.script = reply_deltas
    engine.up = True
    await asyncio.wait_for(task, 5)
    assert [answer.status for answer in answers] == [200]


async def test_a_request_that_kills_every_engine_is_given_up() -> None:
    engine = FakeEngine()
    engine.refuse = EngineUnavailableError("the engine that served this request has stopped; try again")
    asked = 0
    app = completion_app(Harness(engine).state)

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        await app(scope, receive, send)

    answer = await ask_until_answered(counted, engine, body())
    assert (answer.status, asked) == (503, ATTEMPTS)


async def test_rows_are_kept_busy_and_no_more_is_open_than_that_takes() -> None:
    engine = FakeEngine(script=None)
    harness = Harness(engine)
    taken: list[tuple[int, int]] = []
    engines = Engines(completion_app(harness.state), engine, rows=3)
    number = 20
    work = asyncio.create_task(
        answer_all(engines, lines(number), number, lambda line, answer: taken.append((line.number, answer.status)))
    )
    for ended in range(number):
        most = min(number, ended + 3 * LINES_A_ROW)
        await until(partial(lambda opened: len(engine.groups) == opened, most))
        group = engine.groups[ended]
        group.feed(*([delta] for delta in reply_deltas(group.requests[0])))
        await until(partial(lambda answered: len(taken) == answered, ended + 1))
    await asyncio.wait_for(work, 5)
    assert sorted(taken) == [(place + 1, 200) for place in range(number)]


async def test_the_first_error_of_who_takes_the_answers_ends_it() -> None:
    harness = Harness()

    def full(line: Line, answer: Answer) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await answer_all(Engines(completion_app(harness.state), harness.engine, 2), lines(50), 50, full)
