"""What a soak judges by: each judge has to find what it looks for."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.soak.__main__ import judge
from benchmarks.soak.course import Asked, Soaked
from benchmarks.soak.model import number_tokenizer, soak_model
from benchmarks.soak.oracle import Difference, Oracle
from benchmarks.soak.traffic import Answer, Ask, Capacity, Sample, Tally, asks
from benchmarks.soak.watch import ProcessState, Snapshot, grown, growth, leaks, processes_of
from engine.config import ModelConfig
from engine.model.naive import naive_model
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams
from tests.engine.helpers import GOLDEN, golden_tensors

VARIANT = "lookup_prefix2"


@pytest.fixture
def ask() -> Ask:
    return Ask((5, 9, 11, 3, 8), 12, temperature=0.0, top_p=1.0, top_k=0, seed=4, ignore_eos=True, stream=False)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle(ModelConfig.load(GOLDEN / VARIANT), golden_tensors(VARIANT))


def test_a_text_says_which_tokens_were_written(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(number_tokenizer(50304), encoding="utf-8")
    decoder = Tokenizer.load(tmp_path).new_decoder()
    text = decoder.push([0, 50303, 17]) + decoder.push([17]) + decoder.finish()
    assert text.split() == ["0", "50303", "17", "17"]


@pytest.mark.parametrize("name", ["default", "block-302M"])
def test_a_model_directory_is_one_that_can_be_loaded(name: str, tmp_path: Path) -> None:
    model = soak_model(name)
    model.write(tmp_path)
    assert ModelConfig.load(tmp_path) == model.config
    assert Tokenizer.load(tmp_path).vocab_size == model.config.vocab_size
    arguments = model.serve_arguments(tmp_path, rows=8, pages=model.pages_of_longest)
    assert ("--random-weights" in arguments) == (model.weights is None)


def test_requests_are_random_but_the_same_for_a_seed() -> None:
    first, second = (list(islice(asks(3, 4096, truncates=True), 200)) for _ in range(2))
    assert first == second
    assert {ask.temperature for ask in first} == {0.0, 0.7, 1.0}
    assert {ask.stream for ask in first} == {True, False}
    assert all(ask.top_p == 1 and ask.top_k == 0 for ask in islice(asks(3, 4096, truncates=False), 50))


def test_a_sample_is_of_everything_offered(ask: Ask) -> None:
    sample = Sample(50, seed=1)
    for token in range(1000):
        sample.offer(ask, Answer((token,), "length"))
    kept = [answer.token_ids[0] for _, answer in sample.shuffled()]
    assert len(set(kept)) == 50
    assert sum(token >= 500 for token in kept) in range(12, 39)
    assert kept != sorted(kept)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_oracle_scores_as_the_naive_model_generates(oracle: Oracle, ask: Ask, temperature: float) -> None:
    ask = replace(ask, temperature=temperature)
    naive = naive_model(ModelConfig.load(GOLDEN / VARIANT), golden_tensors(VARIANT))
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=ask.seed, ignore_eos=True)
    answer = naive.generate(ask.prompt, params)
    for place, token in enumerate(answer.token_ids):
        scores = oracle.scores(ask, answer.token_ids[:place])
        best, second = scores.topk(2).values.tolist()
        assert int(scores.argmax()) == token
        assert best - second == pytest.approx(answer.margins[place], abs=1e-4)


def test_a_wrong_token_scores_far_below_the_best(oracle: Oracle, ask: Ask) -> None:
    scores = oracle.scores(ask, [7, 7, 7])
    best, second, *_, worst = torch.argsort(scores, descending=True).tolist()
    right = Answer((7, 7, 7, best), "length")
    near = oracle.compare(ask, right, Answer((7, 7, 7, second, 1, 2), "length"))
    far = oracle.compare(ask, Answer((7, 7, 7, worst), "length"), right)
    assert (near.place, far.place) == (3, 3)
    assert near.deficit == pytest.approx(float(scores[best] - scores[second]), abs=1e-5)
    assert far.deficit == pytest.approx(float(scores[best] - scores[worst]), abs=1e-5)
    assert oracle.compare(ask, right, Answer((7, 7, 7), "length")).deficit == float("inf")


def snapshot(second: int, *, rss: float = 100.0, pid: int = 2, descriptors: int = 10, **metrics: float) -> Snapshot:
    gauges = {"engine_up": 1.0, "requests_running": 0.0, "requests_waiting": 0.0, "kv_pages_used": 0.0}
    return Snapshot(second, {"engine": ProcessState("engine", pid, rss, descriptors, 5)}, gauges | metrics, 1000.0)


def test_growth_is_seen_in_each_life() -> None:
    steady = [snapshot(second, rss=500.0 + second % 3) for second in range(40)]
    growing = [snapshot(40 + second, rss=500.0 + 5 * second, pid=3) for second in range(40)]
    short = [snapshot(80 + second, rss=1000.0 * second, pid=4) for second in range(5)]
    found = growth([*steady, *growing, *short])
    assert found.keys() == {"engine 2", "GPU under engine 2", "engine 3", "GPU under engine 3"}
    assert {name: grown(*quarters) for name, quarters in found.items() if not name.startswith("GPU")} == {
        "engine 2": False,
        "engine 3": True,
    }
    assert found["GPU under engine 2"] == (1000.0, 1000.0)


def test_an_engine_that_is_loading_has_not_begun_its_life() -> None:
    loading = [snapshot(second, rss=10.0, engine_up=0.0) for second in range(40)]
    assert growth([*loading, *(snapshot(second) for second in range(40, 60))])["engine 2"] == (100.0, 100.0)


def test_what_is_left_over_is_named() -> None:
    warm = snapshot(0)
    assert leaks(warm, snapshot(9, pid=3, descriptors=12)) == []
    assert leaks(warm, snapshot(9, descriptors=13)) == ["engine has 13 descriptors, and had 10"]
    assert leaks(warm, snapshot(9, kv_pages_used=1.0)) == ["kv_pages_used is 1.0"]
    assert leaks(warm, replace(snapshot(9), processes={})) == ["there is no engine process"]


@pytest.fixture
async def child() -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(60)", "engine.worker", stdout=asyncio.subprocess.DEVNULL
    )
    yield process.pid
    process.kill()
    await process.wait()


async def test_processes_are_found_by_what_they_run(child: int) -> None:
    for _ in range(100):
        found = processes_of(os.getpid())
        if "engine" in found:
            break
        await asyncio.sleep(0.02)
    engine = found["engine"]
    assert engine.pid == child
    assert engine.rss > 1
    assert engine.descriptors >= 3
    assert engine.threads == 1


def soaked(asked: list[Asked], failures: list[tuple[float, str]], restarts: int = 2) -> Soaked:
    return Soaked(
        capacity=Capacity(1.0, 1.0, 1.0),
        warm=snapshot(0),
        last=snapshot(99, engine_restarts_total=restarts),
        snapshots=[snapshot(second) for second in range(20)],
        tally=Tally(failures=failures),
        seconds=20.0,
        outages=[(5.0, 8.0)],
        asked=asked,
        leftovers=[],
    )


def test_every_kind_of_problem_fails_its_check(ask: Ask) -> None:
    answer = Answer((1, 2), "length")
    other = Answer((1, 3), "length")
    model = soak_model("default")
    good = soaked([Asked(ask, answer, answer)], failures=[(6.0, "503")])
    assert not any(judge(model, good, []).values())

    def failed(run: Soaked, judged: list[Difference] | None = None) -> list[str]:
        return [name for name, problems in judge(model, run, judged or []).items() if problems]

    assert failed(soaked([Asked(ask, answer, answer)], failures=[(9.0, "503")])) == ["failures"]
    assert failed(soaked([Asked(ask, answer, answer)], failures=[], restarts=3)) == ["engines"]
    assert failed(soaked([Asked(ask, answer, None)], failures=[])) == ["answers"]
    assert failed(soaked([], failures=[])) == ["answers"]
    assert failed(replace(good, leftovers=["Task-7"])) == ["client"]
    assert failed(replace(good, last=snapshot(99, engine_restarts_total=2, requests_waiting=1))) == ["idle"]
    growing = [snapshot(second, rss=100.0 * second) for second in range(20)]
    assert failed(replace(good, snapshots=growing)) == ["memory"]
    different = soaked([Asked(ask, answer, other)], failures=[])
    assert different.different == [(ask, answer, other)]
    assert failed(different, [Difference(ask, 1, 0.5e-4)]) == []
    assert failed(different, [Difference(ask, 1, 2e-4)]) == ["answers"]
    assert failed(different, [Difference(ask, 1, float("nan"))]) == ["answers"]
