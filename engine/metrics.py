"""Every metric by name, and the recorder that counts them in a process until they are sent to the supervisor.

A "request" in a metric is one answer: what occupies one row (n x prompts of them in one HTTP request).
The table is the only place where a metric is declared; docs/operations.md lists the same names, and a test compares.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Literal, NamedTuple

from engine.messages import MetricsIncrement

PREFIX = "blockserve_"

# From half a millisecond: a small model on a fast card answers that quickly.
SECONDS_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6,
    1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0, 120.0, 240.0,
)  # fmt: skip
TOKEN_GAP_BUCKETS = (
    0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025,
    0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
TOKENS_BUCKETS = tuple(float(1 << power) for power in range(18))
ROWS_BUCKETS = tuple(float(1 << power) for power in range(14))

OUTCOMES = ("stop", "length", "abort", "error", "rejected")


class Metric(NamedTuple):
    """Declaration of one metric. `labels` are names in order; `buckets` are upper bounds without +Inf."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    initial: tuple[tuple[str, ...], ...] = ((),)
    """Label values of the series that exist from the start, at zero."""


def _metric(
    name: str,
    kind: Literal["counter", "gauge", "histogram"],
    help_text: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = (),
    initial: tuple[tuple[str, ...], ...] | None = None,
) -> Metric:
    if initial is None:
        initial = () if labels else ((),)
    return Metric(PREFIX + name, kind, help_text, labels, buckets, initial)


ENGINE = ("engine",)

METRICS: dict[str, Metric] = {
    metric.name.removeprefix(PREFIX): metric
    for metric in (
        _metric("engine_up", "gauge", "1 while the engine can take work.", ENGINE),
        _metric("engine_last_step_timestamp_seconds", "gauge", "When the last step ended (Unix time).", ENGINE),
        _metric("model_info", "gauge", "The served model; always 1.", ("engine", "model", "device", "dtype")),
        _metric(
            "cache_config_info",
            "gauge",
            "The KV cache: positions per page and pages; always 1.",
            ("engine", "block_size", "num_gpu_blocks"),
        ),
        _metric("requests_running", "gauge", "Requests that hold a row.", ENGINE),
        _metric("requests_waiting", "gauge", "Requests that wait for a row.", ENGINE),
        _metric("kv_pages_used", "gauge", "Pages of the KV cache in use.", ENGINE),
        _metric("kv_pages_capacity", "gauge", "Pages of the KV cache.", ENGINE),
        _metric("kv_cache_usage_ratio", "gauge", "Share of the KV cache's pages in use, 0 to 1.", ENGINE),
        _metric("generation_tokens_per_second", "gauge", "Tokens a second over the last seconds; for people.", ENGINE),
        _metric("steps_total", "counter", "Steps run.", ENGINE),
        _metric("preemptions_total", "counter", "Requests that lost their row and were queued again.", ENGINE),
        _metric(
            "prefix_cache_queries_total", "counter", "Prompt tokens of requests that were given a row first.", ENGINE
        ),
        _metric("prefix_cache_hits_total", "counter", "Those of them that the prefix cache held.", ENGINE),
        _metric(
            "requests_routed_total",
            "counter",
            "Requests that an engine took, by what chose it: their prompt's prefix, or the load.",
            ("engine", "by"),
        ),
        _metric("engine_restarts_total", "counter", "Times an engine process was started again after it died.", ENGINE),
        _metric("step_seconds", "histogram", "Duration of a step.", ENGINE, SECONDS_BUCKETS),
        _metric("batch_rows", "histogram", "Rows that decoded in a step.", ENGINE, ROWS_BUCKETS),
        _metric(
            "requests_total",
            "counter",
            "Requests by how they ended.",
            ("outcome",),
            initial=tuple((outcome,) for outcome in OUTCOMES),
        ),
        _metric(
            "prompt_tokens_total",
            "counter",
            "Prompt tokens of requests that got tokens; a prompt with several answers counts once.",
        ),
        _metric("generation_tokens_total", "counter", "Tokens generated and handed on."),
        _metric("http_requests_total", "counter", "HTTP requests answered.", ("handler", "method", "status")),
        _metric(
            "event_loop_lag_seconds",
            "histogram",
            "How much later than it was due an API process got round to something, looked at four times a second.",
            ("api",),
            SECONDS_BUCKETS,
        ),
        _metric(
            "time_to_first_token_seconds",
            "histogram",
            "From a request's arrival to its first tokens.",
            (),
            SECONDS_BUCKETS,
        ),
        _metric(
            "inter_token_latency_seconds",
            "histogram",
            "Gap between two deliveries, divided by the tokens of the second.",
            (),
            TOKEN_GAP_BUCKETS,
        ),
        _metric(
            "time_per_output_token_seconds",
            "histogram",
            "Time from first to last delivery divided by the tokens after the first delivery, per request.",
            (),
            TOKEN_GAP_BUCKETS,
        ),
        _metric(
            "request_latency_seconds",
            "histogram",
            "From a request's arrival to its end, however it ended; only of requests that got tokens.",
            (),
            SECONDS_BUCKETS,
        ),
        _metric(
            "request_queue_seconds",
            "histogram",
            "From arrival at the engine to the first step that worked on it.",
            (),
            SECONDS_BUCKETS,
        ),
        _metric(
            "request_prefill_seconds", "histogram", "From that step's start to the first tokens.", (), SECONDS_BUCKETS
        ),
        _metric(
            "request_decode_seconds", "histogram", "From a request's first tokens to its last.", (), SECONDS_BUCKETS
        ),
        _metric("request_prompt_tokens", "histogram", "Prompt tokens of a request.", (), TOKENS_BUCKETS),
        _metric("request_generation_tokens", "histogram", "Tokens generated for a request.", (), TOKENS_BUCKETS),
    )
}

SeriesKey = tuple[str, tuple[str, ...]]


class _Buckets:
    """One histogram series since the last flush."""

    __slots__ = ("counts", "sum")

    def __init__(self, size: int) -> None:
        self.counts = [0] * size
        self.sum = 0.0


class MetricsRecorder:
    """Counts in this process what has not been sent yet.

    `send` gets the increments at `flush`. Metrics are named without the prefix; a name that is not declared, or labels
    that do not fit, raise KeyError or ValueError at once rather than vanish.
    """

    def __init__(self, send: Callable[[MetricsIncrement], None]) -> None:
        self._send = send
        self._counters: dict[SeriesKey, float] = {}
        self._histograms: dict[SeriesKey, _Buckets] = {}
        self._gauges: dict[SeriesKey, float] = {}

    @property
    def dirty(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._counters or self._histograms or self._gauges)

    def count(self, name: str, amount: float = 1, labels: tuple[str, ...] = ()) -> None:
        """Add to a counter."""
        key = _series(name, "counter", labels)
        self._counters[key] = self._counters.get(key, 0) + amount

    def observe(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        """Add one observation to a histogram."""
        key = _series(name, "histogram", labels)
        bounds = METRICS[name].buckets
        series = self._histograms.get(key)
        if series is None:
            series = self._histograms[key] = _Buckets(len(bounds) + 1)
        series.counts[bisect_left(bounds, value)] += 1
        series.sum += value

    def gauge(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        """Set a gauge."""
        self._gauges[_series(name, "gauge", labels)] = value

    def flush(self) -> None:
        """Send what was counted since the last flush, if anything."""
        if not self.dirty:
            return
        increment = MetricsIncrement(
            counters=[(name, labels, value) for (name, labels), value in self._counters.items()],
            histograms=[(name, labels, s.counts, s.sum) for (name, labels), s in self._histograms.items()],
            gauges=[(name, labels, value) for (name, labels), value in self._gauges.items()],
        )
        self._counters, self._histograms, self._gauges = {}, {}, {}
        self._send(increment)


def _series(name: str, kind: str, labels: tuple[str, ...]) -> SeriesKey:
    metric = METRICS[name]
    if metric.kind != kind or len(labels) != len(metric.labels):
        raise ValueError(f"{name} is a {metric.kind} with labels {metric.labels}, not a {kind} with {labels}")
    return name, labels
