"""The figures of one answer."""

import pytest

from engine.metrics import MetricsRecorder
from engine.types import Timing
from server.answer_metrics import AnswerMetrics, Outcome, PromptTally
from tests.server.fakes import Counted

TIMING = Timing(queue=0.5, prefill=1.5)


def make(prompt_tokens: int = 7) -> tuple[AnswerMetrics, MetricsRecorder, Counted]:
    counted = Counted()
    recorder = MetricsRecorder(counted.add)
    return AnswerMetrics(recorder, PromptTally(prompt_tokens), 10.0), recorder, counted


def test_one_answer() -> None:
    metrics, recorder, counted = make()
    assert metrics.seconds_to_first_token is None
    metrics.delivered(4, TIMING, 12.0)
    metrics.delivered(4, None, 13.0)
    metrics.delivered(2, None, 16.0)
    metrics.ended("length", 17.0)
    recorder.flush()
    assert metrics.seconds_to_first_token == 2.0
    assert counted.counters == {
        ("generation_tokens_total",): 10, ("prompt_tokens_total",): 7, ("requests_total", "length"): 1,
    }  # fmt: skip
    assert counted.sums == {
        "time_to_first_token_seconds": 2.0,
        "request_queue_seconds": 0.5,
        "request_prefill_seconds": 1.5,
        "inter_token_latency_seconds": 1 / 4 + 3 / 2,
        "time_per_output_token_seconds": 4 / 6,
        "request_latency_seconds": 7.0,
        "request_decode_seconds": 4.0,
        "request_prompt_tokens": 7,
        "request_generation_tokens": 10,
    }
    assert counted.observations["inter_token_latency_seconds"] == 2


def test_an_answer_of_one_delivery_has_no_time_per_token() -> None:
    metrics, recorder, counted = make()
    metrics.delivered(3, TIMING, 12.0)
    metrics.ended("stop", 12.0)
    recorder.flush()
    assert "time_per_output_token_seconds" not in counted.observations
    assert counted.observations["request_latency_seconds"] == 1


@pytest.mark.parametrize("outcome", ["abort", "error", "rejected"])
def test_without_tokens_only_the_outcome_counts(outcome: Outcome) -> None:
    metrics, recorder, counted = make()
    metrics.delivered(0, None, 11.0)
    metrics.ended(outcome, 12.0)
    recorder.flush()
    assert counted.counters == {("requests_total", outcome): 1}
    assert counted.observations == {}


def test_only_the_first_end_counts() -> None:
    metrics, recorder, counted = make()
    metrics.delivered(1, TIMING, 11.0)
    metrics.ended("stop", 12.0)
    metrics.ended("abort", 13.0)
    metrics.delivered(1, None, 14.0)
    recorder.flush()
    assert counted.counters["requests_total", "stop"] == 1
    assert ("requests_total", "abort") not in counted.counters
    assert counted.counters["generation_tokens_total",] == 1


def test_a_shared_prompt_counts_once() -> None:
    counted = Counted()
    recorder, prompt = MetricsRecorder(counted.add), PromptTally(7)
    for _ in range(3):
        AnswerMetrics(recorder, prompt, 0.0).delivered(1, TIMING, 1.0)
    recorder.flush()
    assert counted.counters["prompt_tokens_total",] == 7
    assert counted.observations["time_to_first_token_seconds"] == 3
