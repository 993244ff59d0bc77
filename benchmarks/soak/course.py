"""The course of a soak: warm up and measure, load with kills, and the sampled requests once more, each alone."""

import asyncio
import os
import signal
import threading
import time
from dataclasses import dataclass

from benchmarks.soak.model import SoakModel
from benchmarks.soak.traffic import Answer, Ask, Capacity, Client, Sample, Tally, asks, capacity, one, poisson
from benchmarks.soak.watch import Snapshot, Watcher

LOAD = 0.9
"""Of the measured capacity, in requests a second."""
KILLS = 2
GRACE_SECONDS = 2.0
"""Requests may fail from the moment an engine is killed until so long after its successor is up."""
IDLE_SECONDS = 60.0
"""What the service gets to finish in once nobody asks any more."""
MOST_WINDOWS = 12
SAMPLE_SIZE = 4000


@dataclass(frozen=True)
class Plan:
    """How long and how hard."""

    rows: int
    window: float
    """Seconds of each of the windows in which the capacity is measured."""
    seconds: float
    """Of load."""
    check_seconds: float
    seed: int


@dataclass(frozen=True)
class Asked:
    """A request, the answer under load and the one alone; None where it got none."""

    ask: Ask
    loaded: Answer
    alone: Answer | None


@dataclass(frozen=True)
class Soaked:
    """What a soak saw."""

    capacity: Capacity
    warm: Snapshot
    """Idle, after the capacity was measured."""
    last: Snapshot
    """Idle, after the load."""
    snapshots: list[Snapshot]
    """Under load."""
    tally: Tally
    seconds: float
    """Of load."""
    outages: list[tuple[float, float]]
    """In which requests may fail (monotonic seconds)."""
    asked: list[Asked]
    leftovers: list[str]
    """Tasks and threads of the client that did not end."""

    @property
    def different(self) -> list[tuple[Ask, Answer, Answer]]:
        """Requests that were answered under load and alone, and not the same."""
        return [
            (asked.ask, asked.loaded, asked.alone)
            for asked in self.asked
            if asked.alone is not None and asked.alone != asked.loaded
        ]


async def soak(watcher: Watcher, model: SoakModel, plan: Plan) -> Soaked:
    """All of it, on a server that is ready. Raises FailedError if it cannot be loaded at all."""
    threads = threading.active_count()
    url, eos = watcher.url, model.config.eos_token_id
    source = asks(plan.seed, model.config.vocab_size, truncates=model.truncates)
    client = Client(url, eos)
    found = await capacity(client, source, plan.rows * 5 // 4, plan.window, MOST_WINDOWS)
    await client.close()
    warm = await _when_idle(watcher)

    client, tally, sample = Client(url, eos), Tally(), Sample(SAMPLE_SIZE, plan.seed)
    watching = asyncio.create_task(watcher.run(), name="watcher")
    killing = asyncio.create_task(_kill_engines(watcher, plan.seconds), name="killer")
    started = time.monotonic()
    rate, patience = LOAD * found.answers_s, found.answer_seconds
    await poisson(client, source, rate, plan.seconds, patience, plan.seed, tally, sample)
    seconds = time.monotonic() - started
    outages = await killing
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await client.close()
    last = await _when_idle(watcher)
    await watcher.close()

    asked = await _ask_alone(Client(url, eos), sample, plan.check_seconds)
    leftovers = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if (more := threading.active_count() - threads) > 0:
        leftovers.append(f"{more} threads")
    return Soaked(found, warm, last, watcher.snapshots, tally, seconds, outages, asked, leftovers)


async def _when_idle(watcher: Watcher) -> Snapshot:
    """A snapshot once the service has nothing to do, or of what it is still doing after IDLE_SECONDS."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        # Clients' connections are gone, and metrics have been sent, some moments after the last answer.
        await asyncio.sleep(2)
        snapshot = await watcher.look()
        if snapshot.idle or time.monotonic() > deadline:
            return snapshot


async def _kill_engines(watcher: Watcher, seconds: float) -> list[tuple[float, float]]:
    """Kill the engine at even intervals; returns the outages."""
    outages, started = [], time.monotonic()
    for number in range(1, KILLS + 1):
        await asyncio.sleep(max(0.0, started + seconds * number / (KILLS + 1) - time.monotonic()))
        engine = (await watcher.until_engine_up()).processes["engine"].pid
        killed = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        await watcher.until_engine_up(besides=engine)
        outages.append((killed, time.monotonic() + GRACE_SECONDS))
    return outages


async def _ask_alone(client: Client, sample: Sample, seconds: float) -> list[Asked]:
    """Ask one sampled request after the other, in random order, for `seconds`."""
    asked: list[Asked] = []
    end = time.monotonic() + seconds
    for ask, loaded in sample.shuffled():
        if time.monotonic() > end:
            break
        asked.append(Asked(ask, loaded, await one(client, ask, Tally())))
    await client.close()
    return asked
