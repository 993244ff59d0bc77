"""Mixed traffic through the real engine, with a tiny model on the CPU."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import steady_state
from benchmarks.harness import engine_config, loaded_core
from benchmarks.mixed import arriving, measure_model, parse, percentiles, run_at_once, show, with_room
from benchmarks.models import WORKLOADS, BenchmarkModel, Workload
from benchmarks.traffic import always_say_eos, mixed_requests
from tests.benchmarks.tiny import MODEL, TINY, VANILLA


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(WORKLOADS, "P", Workload("P", prompt_tokens=40, answer_tokens=8))
    monkeypatch.setitem(WORKLOADS, "D", Workload("D", prompt_tokens=8, answer_tokens=24))
    # Steps are few where answers are short.
    monkeypatch.setattr(steady_state, "STEPS", 4)
    line = ["--device", "cpu", "--dtype", "float32", "--max-step-positions", "32", "--no-results", "--batches", "20"]
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
        assert row["requests"] == (8 if saturated else 80)
        assert row["begins"] == ("steady" if row["workload"] == "D" and not saturated else "empty")
        assert 0 < row["rows_open"] <= row["rows"] <= 4
        assert row["of_fixed"] == pytest.approx(row["tok_s"] / row["fixed_tok_s"])
        assert row["arrivals"] == ("at once" if saturated else "poisson")
        if not saturated:
            assert row["of_offered"] == pytest.approx(row["tok_s"] / (0.9 * row["fixed_tok_s"]))
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


def test_an_answer_that_does_not_end_where_it_should_is_noticed(arguments: argparse.Namespace) -> None:
    config = engine_config(MODEL, arguments, max_waiting=64)
    requests = mixed_requests(WORKLOADS["D"], 2, TINY.vocab_size, np.random.default_rng(3))
    with loaded_core(MODEL, config) as core, pytest.raises(RuntimeError, match="did not end where it should"):
        run_at_once(core, requests)


def test_how_many_arrive_depends_on_how_the_batch_begins() -> None:
    assert arriving(WORKLOADS["D"], 100, parse([])) == 100
    assert arriving(WORKLOADS["P"], 100, parse([])) == 400
    assert arriving(WORKLOADS["P"], 100, parse(["--batches", "2"])) == 200
    assert arriving(WORKLOADS["D"], 100, parse(["--saturated"])) == 200
    assert arriving(WORKLOADS["D"], 100, parse(["--requests", "7"])) == 7


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([0.001, 0.003]) == {"p50": 2.0, "p90": 2.8, "p99": 2.98}
    assert percentiles([]) == {}


def test_the_model_gets_room_for_the_longest_requests() -> None:
    assert with_room(MODEL, [Workload("X", 100, 50)]).config.max_length == 450
    assert with_room(MODEL, [Workload("D", 10, 5)]).config.max_length == TINY.max_length
