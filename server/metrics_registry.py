"""The only registry of metrics: the supervisor adds up what its processes count, and renders it on request.

Increments come from processes that die and are started again. Counters and histograms only grow; a gauge belongs to
the process that set it last and goes when that process dies.
"""

import math
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.messages import MetricsIncrement, ProtocolError
from engine.metrics import METRICS, Metric

Labels = tuple[str, ...]

TEXT_CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST
OPENMETRICS_CONTENT_TYPE = openmetrics_exposition.CONTENT_TYPE_LATEST


class _Histogram:
    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0


class MetricStore(Collector):
    """Every series of every declared metric, and its rendering."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = {}
        self._gauges: dict[str, dict[Labels, tuple[float, str]]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}
        for name, metric in METRICS.items():
            if metric.kind == "counter":
                self._counters[name] = dict.fromkeys(metric.initial, 0.0)
            elif metric.kind == "histogram":
                self._histograms[name] = {labels: _Histogram(len(metric.buckets) + 1) for labels in metric.initial}
            else:
                self._gauges[name] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def apply(self, increment: MetricsIncrement, source: str) -> None:
        """Add what the process called `source` counted, and take over its gauges.

        Raises ProtocolError, with nothing of it applied, for a metric that is not declared so or a number that is none.
        """
        _check(increment)
        for name, labels, amount in increment.counters:
            series = self._counters[name]
            series[labels] = series.get(labels, 0.0) + amount
        for name, labels, counts, total in increment.histograms:
            histogram = self._histograms[name].setdefault(labels, _Histogram(len(counts)))
            histogram.counts = [old + new for old, new in zip(histogram.counts, counts, strict=True)]
            histogram.sum += total
        for name, labels, value in increment.gauges:
            self._gauges[name][labels] = (value, source)

    def forget_gauges(self, source: str) -> None:
        """Remove the gauges of a process that died."""
        for series in self._gauges.values():
            for labels in [labels for labels, (_, owner) in series.items() if owner == source]:
                del series[labels]

    def value(self, name: str, labels: Labels = ()) -> float | None:
        """A counter's or gauge's value, None if there is no such series. `name` is without prefix."""
        if name in self._gauges:
            gauge = self._gauges[name].get(labels)
            return None if gauge is None else gauge[0]
        return self._counters[name].get(labels)

    def render(self, openmetrics: bool) -> tuple[str, bytes]:
        """Content type and body of a scrape, in Prometheus text or OpenMetrics."""
        if openmetrics:
            body: bytes = openmetrics_exposition.generate_latest(self._registry)  # type: ignore[no-untyped-call]
            return OPENMETRICS_CONTENT_TYPE, body
        return TEXT_CONTENT_TYPE, exposition.generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        """prometheus_client's side: every metric with its series."""
        for name, metric in METRICS.items():
            if metric.kind == "counter":
                counter = CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
                for labels, amount in self._counters[name].items():
                    counter.add_metric(labels, amount)
                yield counter
            elif metric.kind == "gauge":
                gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, (value, _) in self._gauges[name].items():
                    gauge.add_metric(labels, value)
                yield gauge
            else:
                histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, histogram in self._histograms[name].items():
                    histograms.add_metric(labels, _cumulative(metric, histogram.counts), histogram.sum)
                yield histograms


def _cumulative(metric: Metric, counts: Iterable[int]) -> list[tuple[str, float]]:
    bounds = [str(floatToGoString(bound)) for bound in (*metric.buckets, math.inf)]  # type: ignore[no-untyped-call]
    result, total = [], 0
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        result.append((bound, float(total)))
    return result


def _check(increment: MetricsIncrement) -> None:
    for name, labels, amount in increment.counters:
        _declared(name, "counter", labels)
        if not (math.isfinite(amount) and amount >= 0):
            raise ProtocolError(f"counter {name} cannot grow by {amount}")
    for name, labels, _ in increment.gauges:
        _declared(name, "gauge", labels)
    for name, labels, counts, total in increment.histograms:
        metric = _declared(name, "histogram", labels)
        if len(counts) != len(metric.buckets) + 1:
            raise ProtocolError(f"histogram {name} has {len(metric.buckets) + 1} buckets, not {len(counts)}")
        if min(counts) < 0 or not math.isfinite(total):
            raise ProtocolError(f"histogram {name} cannot grow by counts {counts} with sum {total}")


def _declared(name: str, kind: str, labels: Labels) -> Metric:
    metric = METRICS.get(name)
    if metric is None:
        raise ProtocolError(f"no metric is called {name[:100]!r}")
    if metric.kind != kind or len(labels) != len(metric.labels):
        raise ProtocolError(f"{name} is a {metric.kind} with labels {metric.labels}, not a {kind} with {len(labels)}")
    return metric
