"""The supervisor's registry: sums over processes and their restarts, and both text formats."""

from collections.abc import Callable

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.messages import MetricsIncrement, ProtocolError
from engine.metrics import METRICS, OUTCOMES, MetricsRecorder
from server.metrics_registry import OPENMETRICS_CONTENT_TYPE, TEXT_CONTENT_TYPE, MetricStore


def samples(store: MetricStore, openmetrics: bool = False) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body = store.render(openmetrics)[1].decode()
    families = parse_openmetrics(body) if openmetrics else parse_text(body)  # type: ignore[no-untyped-call]
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def increments(count: Callable[[MetricsRecorder], None]) -> MetricsIncrement:
    sent: list[MetricsIncrement] = []
    recorder = MetricsRecorder(sent.append)
    count(recorder)
    recorder.flush()
    return sent[0]


def test_series_that_are_known_beforehand_exist_at_zero() -> None:
    found = samples(MetricStore())
    for outcome in OUTCOMES:
        assert found["blockserve_requests_total", (("outcome", outcome),)] == 0
    assert found["blockserve_generation_tokens_total", ()] == 0
    assert found["blockserve_time_to_first_token_seconds_count", ()] == 0
    assert found["blockserve_time_to_first_token_seconds_bucket", (("le", "+Inf"),)] == 0


def test_increments_of_several_processes_add_up() -> None:
    store = MetricStore()
    for source in ("api 0", "api 1", "api 0"):
        store.apply(MetricsIncrement(counters=[("generation_tokens_total", (), 5.0)]), source)
    assert store.value("generation_tokens_total") == 15


def test_histograms_add_up_and_are_rendered_cumulatively() -> None:
    store = MetricStore()

    def count(recorder: MetricsRecorder) -> None:
        for value in (1.0, 2.0, 3.0, 1e9):
            recorder.observe("batch_rows", value, ("0",))

    store.apply(increments(count), "engine 0")
    store.apply(increments(count), "engine 0")
    found = samples(store)
    name = "blockserve_batch_rows"
    buckets = [(bound, found[name + "_bucket", (("engine", "0"), ("le", bound))]) for bound in ("1.0", "2.0", "4.0")]
    assert buckets == [("1.0", 2), ("2.0", 4), ("4.0", 6)]
    assert found[name + "_bucket", (("engine", "0"), ("le", "+Inf"))] == 8
    assert found[name + "_count", (("engine", "0"),)] == 8
    assert found[name + "_sum", (("engine", "0"),)] == 2 * (6 + 1e9)


def test_a_dead_process_loses_its_gauges_and_no_counter() -> None:
    store = MetricStore()
    for engine in ("0", "1"):
        store.apply(
            MetricsIncrement(
                counters=[("steps_total", (engine,), 3.0)],
                gauges=[("requests_running", (engine,), 4.0), ("kv_pages_used", (engine,), 9.0)],
            ),
            f"engine {engine}",
        )
    store.apply(MetricsIncrement(gauges=[("engine_up", ("0",), 1.0)]), "supervisor")
    store.forget_gauges("engine 0")
    assert store.value("requests_running", ("0",)) is None
    assert store.value("kv_pages_used", ("0",)) is None
    assert store.value("requests_running", ("1",)) == 4
    assert store.value("engine_up", ("0",)) == 1
    store.apply(MetricsIncrement(counters=[("steps_total", ("0",), 1.0)]), "engine 0")
    assert store.value("steps_total", ("0",)) == 4


def test_a_gauge_that_a_successor_took_over_outlives_the_late_news_of_the_death() -> None:
    store = MetricStore()
    store.apply(MetricsIncrement(gauges=[("requests_running", ("0",), 4.0)]), "engine 0 pid 1")
    store.apply(MetricsIncrement(gauges=[("requests_running", ("0",), 0.0)]), "engine 0 pid 2")
    store.forget_gauges("engine 0 pid 1")
    assert store.value("requests_running", ("0",)) == 0


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_declared_metric_is_rendered_and_parses(openmetrics: bool) -> None:
    store = MetricStore()

    def count(recorder: MetricsRecorder) -> None:
        for name, metric in METRICS.items():
            labels = tuple('a"\\\n' for _ in metric.labels)
            if metric.kind == "counter":
                recorder.count(name, 2, labels)
            elif metric.kind == "gauge":
                recorder.gauge(name, 2, labels)
            else:
                recorder.observe(name, 2, labels)

    store.apply(increments(count), "test")
    found = samples(store, openmetrics)
    for name, metric in METRICS.items():
        labels = tuple(sorted((label, 'a"\\\n') for label in metric.labels))
        rendered = metric.name + ("_sum" if metric.kind == "histogram" else "")
        assert found[rendered, labels] == 2, name


def test_the_content_type_says_which_format_it_is() -> None:
    store = MetricStore()
    assert store.render(openmetrics=False)[0] == TEXT_CONTENT_TYPE
    content_type, body = store.render(openmetrics=True)
    assert content_type == OPENMETRICS_CONTENT_TYPE
    assert body.endswith(b"# EOF\n")
    assert "text/plain" in TEXT_CONTENT_TYPE
    assert "application/openmetrics-text" in OPENMETRICS_CONTENT_TYPE


@pytest.mark.parametrize(
    "increment",
    [
        MetricsIncrement(counters=[("nonsense_total", (), 1.0)]),
        MetricsIncrement(counters=[("steps_total", (), 1.0)]),
        MetricsIncrement(counters=[("requests_running", ("0",), 1.0)]),
        MetricsIncrement(counters=[("generation_tokens_total", (), -1.0)]),
        MetricsIncrement(counters=[("generation_tokens_total", (), float("nan"))]),
        MetricsIncrement(counters=[("generation_tokens_total", (), float("inf"))]),
        MetricsIncrement(gauges=[("steps_total", ("0",), 1.0)]),
        MetricsIncrement(gauges=[("engine_up", ("0", "1"), 1.0)]),
        MetricsIncrement(histograms=[("batch_rows", ("0",), [1], 1.0)]),
        MetricsIncrement(histograms=[("batch_rows", ("0",), [], 1.0)]),
        MetricsIncrement(histograms=[("batch_rows", ("0",), [-1] + [0] * 14, 1.0)]),
        MetricsIncrement(histograms=[("batch_rows", ("0",), [1] + [0] * 14, float("nan"))]),
        MetricsIncrement(histograms=[("steps_total", ("0",), [1], 1.0)]),
    ],
)
def test_what_is_not_declared_is_refused_whole(increment: MetricsIncrement) -> None:
    store = MetricStore()
    before = store.render(openmetrics=False)
    good = [("generation_tokens_total", (), 1.0)]
    with pytest.raises(ProtocolError):
        store.apply(
            MetricsIncrement(
                counters=[*good, *increment.counters], histograms=increment.histograms, gauges=increment.gauges
            ),
            "api 0",
        )
    assert store.render(openmetrics=False) == before
