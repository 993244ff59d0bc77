"""Mixed traffic through the real engine, with a tiny model on the CPU."""

import argparse
import json

import numpy as np
import pytest

from benchmarks.harness import engine_config, loaded_core
from benchmarks.mixed import Course, drive, measure_model, parse, percentiles, show, with_room
from benchmarks.models import WORKLOADS, BenchmarkModel, Workload
from benchmarks.traffic import Arrival, always_say_eos, mixed_requests
from tests.benchmarks.tiny import MODEL, TINY, VANILLA


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(WORKLOADS, "P", Workload("P", prompt_tokens=40, answer_tokens=8))
    monkeypatch.setitem(WORKLOADS, "D", Workload("D", prompt_tokens=8, answer_tokens=24))
    line = ["--device", "cpu", "--dtype", "float32", "--max-step-positions", "32", "--no-results", "--batches", "6"]
    return parse(line)


@pytest.mark.parametrize("saturated", [False, True])
def test_a_row_compares_with_fixed_lengths(
    saturated: bool, arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.saturated = saturated
    rows = measure_model(MODEL, arguments)
    assert [row["workload"] for row in rows] == ["P", "D"]
    for row in rows:
        assert row["bench"] == "mixed"
        assert row["requests"] == (8 if saturated else 24)
        assert row["of_fixed"] == pytest.approx(row["tok_s"] / row["fixed_tok_s"])
        assert row["arrivals"] == ("at once" if saturated else "poisson")
        assert row["ttft_ms"]["p50"] > 0
        assert row["block_ms"]["p50"] > 0
        json.dumps(row)
    show(rows)
    assert "of fixed" in capsys.readouterr().out


@pytest.mark.parametrize("model", [MODEL, VANILLA], ids=["block", "vanilla"])
def test_answers_end_by_eos_where_they_were_drawn_to(model: BenchmarkModel, arguments: argparse.Namespace) -> None:
    requests = mixed_requests(WORKLOADS["D"], 9, TINY.vocab_size, np.random.default_rng(3))
    config = engine_config(model, arguments, max_waiting=64)
    reasons, counts = set(), dict.fromkeys((request.request_id for request in requests), 0)
    with loaded_core(model, config, change=lambda tensors: always_say_eos(tensors, TINY.eos_token_id)) as core:
        core.add([(request.request_id, request) for request in requests])
        while core.has_work:
            report = core.step()
            for _, delta in report.deltas if report is not None else ():
                counts[delta.request_id] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    reasons.add((delta.finish_reason, delta.token_ids[-1]))
    assert reasons == {("stop", TINY.eos_token_id)}
    assert list(counts.values()) == [request.params.min_tokens + 1 for request in requests]
    assert min(counts.values()) < 24 < max(counts.values()) <= 3 * 24


def test_requests_are_submitted_at_their_moments(arguments: argparse.Namespace) -> None:
    config = engine_config(MODEL, arguments, max_waiting=64)
    requests = mixed_requests(Workload("D", 8, 4), 3, TINY.vocab_size, np.random.default_rng(3))
    with loaded_core(MODEL, config, change=lambda tensors: always_say_eos(tensors, TINY.eos_token_id)) as core:
        course = drive(core, [Arrival(0.1 * place, request) for place, request in enumerate(requests)])
    assert course.seconds >= 0.2
    assert [arrival for arrival, _ in course.first_tokens] == pytest.approx([0.0, 0.1, 0.2])
    assert all(seconds > 0 for _, seconds in course.first_tokens)


def test_an_answer_that_does_not_end_where_it_should_is_noticed(arguments: argparse.Namespace) -> None:
    config = engine_config(MODEL, arguments, max_waiting=64)
    requests = mixed_requests(WORKLOADS["D"], 2, TINY.vocab_size, np.random.default_rng(3))
    with loaded_core(MODEL, config) as core, pytest.raises(RuntimeError, match="did not end where they should"):
        drive(core, [Arrival(0.0, request) for request in requests])


def test_only_what_lies_in_the_window_counts() -> None:
    course = Course(steps=[(1.0, 2, 8), (2.0, 3, 12), (4.0, 1, 4)], first_tokens=[(0.5, 0.1), (1.5, 0.2)])
    assert course.tokens_between(1.5, 4.0) == 12
    assert course.first_token_times(1.0, 2.0) == [0.2]
    assert course.block_times(1.5, 5.0).tolist() == [1.0, 1.0, 1.0, 2.0]
    assert percentiles([0.001, 0.003]) == {"p50": 2.0, "p90": 2.8, "p99": 2.98}
    assert percentiles([]) == {}


def test_the_model_gets_room_for_the_longest_requests() -> None:
    assert with_room(MODEL, [Workload("X", 100, 50)]).config.max_length == 450
    assert with_room(MODEL, [Workload("D", 10, 5)]).config.max_length == TINY.max_length
