import pytest

from benchmarks import latency
from benchmarks.harness import engine_config, loaded_core, make_requests
from benchmarks.latency import answer_one, measure_model, parse, show
from benchmarks.models import Workload
from tests.benchmarks.tiny import MODEL, TINY

LINE = ["--device", "cpu", "--dtype", "float32", "--max-step-positions", "32"]


def test_rows_have_the_form_of_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(latency, "SINGLE", Workload("single", 12, 20))
    monkeypatch.setattr("benchmarks.floor.copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(latency, "FIRST", Workload("first", 100, 1))
    single, first = measure_model(MODEL, parse([*LINE, "--floor"]))
    assert (single["bench"], single["workload"], single["rows"]) == ("latency", "12 in 20 out", 1)
    assert single["tok_s"] == pytest.approx(20 / single["seconds"])
    assert 0 < single["ttft_ms"] < 1e3 * single["seconds"]
    assert single["floor_tok_s"] > 0
    assert first["workload"] == "100 in"
    assert 0 < first["ttft_ms"] <= first["ttft_ms_worst"]
    show([single, first])
    assert "first token" in capsys.readouterr().out


def test_an_answer_of_one_block_is_there_with_its_first_token() -> None:
    config = engine_config(MODEL, parse(LINE), max_waiting=1)
    with loaded_core(MODEL, config) as core:
        (request,) = make_requests(Workload("first", 40, 1), 1, TINY.vocab_size)
        first, whole = answer_one(core, request)
        assert not core.has_work
    assert 0 < first <= whole
