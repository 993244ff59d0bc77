import re

import pytest

from engine.messages import MetricsIncrement
from engine.metrics import METRICS, OUTCOMES, PREFIX, MetricsRecorder


def recorder() -> tuple[MetricsRecorder, list[MetricsIncrement]]:
    sent: list[MetricsIncrement] = []
    return MetricsRecorder(sent.append), sent


def test_declarations_are_sound() -> None:
    for key, metric in METRICS.items():
        assert metric.name == PREFIX + key
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name) and metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert all(len(labels) == len(metric.labels) for labels in metric.initial)


def test_every_outcome_exists_from_the_start() -> None:
    assert METRICS["requests_total"].initial == tuple((outcome,) for outcome in OUTCOMES)


def test_counters_add_up_and_gauges_keep_the_last_value() -> None:
    counts, sent = recorder()
    counts.count("requests_total", labels=("stop",))
    counts.count("requests_total", 2, ("stop",))
    counts.count("requests_total", labels=("length",))
    counts.gauge("kv_pages_used", 3, ("0",))
    counts.gauge("kv_pages_used", 1, ("0",))
    counts.flush()
    assert sent == [
        MetricsIncrement(
            counters=[("requests_total", ("stop",), 3), ("requests_total", ("length",), 1)],
            gauges=[("kv_pages_used", ("0",), 1)],
        )
    ]


def test_an_observation_falls_into_the_bucket_whose_bound_it_does_not_exceed() -> None:
    counts, sent = recorder()
    bounds = METRICS["request_latency_seconds"].buckets
    for value in (0.0, bounds[0], bounds[0] + 1e-9, bounds[-1], bounds[-1] * 2):
        counts.observe("request_latency_seconds", value)
    counts.flush()
    ((name, labels, buckets, total),) = sent[0].histograms
    assert (name, labels) == ("request_latency_seconds", ())
    assert len(buckets) == len(bounds) + 1 and sum(buckets) == 5
    assert (buckets[0], buckets[1], buckets[-2], buckets[-1]) == (2, 1, 1, 1)
    assert total == pytest.approx(2 * bounds[0] + 1e-9 + 3 * bounds[-1])


def test_nothing_is_sent_twice_or_for_nothing() -> None:
    counts, sent = recorder()
    counts.flush()
    assert sent == []
    counts.count("steps_total", labels=("0",))
    counts.flush()
    counts.flush()
    assert len(sent) == 1


@pytest.mark.parametrize("kind", ["counter", "gauge", "histogram"])
def test_it_knows_whether_anything_waits_to_be_sent(kind: str) -> None:
    counts, _ = recorder()
    states = [counts.dirty]
    match kind:
        case "counter":
            counts.count("steps_total", labels=("0",))
        case "gauge":
            counts.gauge("requests_running", 1, ("0",))
        case _:
            counts.observe("step_seconds", 1, ("0",))
    states.append(counts.dirty)
    counts.flush()
    assert [*states, counts.dirty] == [False, True, False]


def test_counts_survive_a_send_that_counts_itself() -> None:
    sent: list[MetricsIncrement] = []

    def send(increment: MetricsIncrement) -> None:
        sent.append(increment)
        counts.count("prompt_tokens_total")

    counts = MetricsRecorder(send)
    counts.count("prompt_tokens_total", 5)
    counts.flush()
    counts.flush()
    assert [increment.counters[0][2] for increment in sent] == [5, 1]


def test_names_that_are_not_declared_are_errors() -> None:
    counts, _ = recorder()
    with pytest.raises(KeyError):
        counts.count("requests")


@pytest.mark.parametrize(
    ("name", "labels"),
    [("requests_total", ()), ("steps_total", ("0", "1")), ("kv_pages_used", ("0",)), ("step_seconds", ("0",))],
)
def test_a_wrong_kind_or_wrong_labels_are_errors(name: str, labels: tuple[str, ...]) -> None:
    counts, _ = recorder()
    with pytest.raises(ValueError, match="is a "):
        counts.count(name, labels=labels)


def test_gauges_and_histograms_check_their_kind_too() -> None:
    counts, _ = recorder()
    with pytest.raises(ValueError, match="is a counter"):
        counts.gauge("prompt_tokens_total", 1)
    with pytest.raises(ValueError, match="is a counter"):
        counts.observe("prompt_tokens_total", 1)
