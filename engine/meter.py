"""What an engine counts of its own work: steps, preemptions and load, sent while it runs and when it goes idle."""

import time
from collections import deque
from typing import NamedTuple

from engine.metrics import MetricsRecorder
from engine.types import EngineInfo, EngineLoad

FLUSH_SECONDS = 0.25
RATE_WINDOW_SECONDS = 5.0


class EngineTotals(NamedTuple):
    """What an engine has counted in its whole life: the counters of the same names, which end in _total."""

    preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens of admitted requests."""
    prefix_cache_hits: int = 0
    """Those of them that the prefix cache held."""


class EngineMeter:
    """Counts steps and publishes gauges, at most every FLUSH_SECONDS and when the engine goes idle."""

    def __init__(self, info: EngineInfo, recorder: MetricsRecorder, labels: tuple[str, ...]) -> None:
        """`labels` are those of every metric of one engine: its index."""
        self._info = info
        self._recorder = recorder
        self._labels = labels
        self._next_flush = 0.0
        self._published: EngineLoad | None = None
        self._totals = EngineTotals()
        self._window: deque[tuple[float, int]] = deque()
        self._rate_published = -1.0
        recorder.gauge("model_info", 1, (*labels, info.model, info.device, info.dtype))
        recorder.gauge("cache_config_info", 1, (*labels, str(info.page_size), str(info.pages)))
        recorder.gauge("kv_pages_capacity", info.pages, labels)

    def count_step(self, *, rows: int, tokens: int, seconds: float) -> None:
        """A step was committed, in which `rows` rows decoded and `tokens` tokens were handed out."""
        self._recorder.count("steps_total", labels=self._labels)
        self._recorder.observe("step_seconds", seconds, self._labels)
        self._recorder.observe("batch_rows", rows, self._labels)
        self._recorder.gauge("engine_last_step_timestamp_seconds", time.time(), self._labels)
        self._window.append((time.monotonic(), tokens))

    def idle_timeout(self) -> float | None:
        """How long an idle engine may sleep: until the rate gauge has to fall, or until a message comes."""
        return FLUSH_SECONDS if self._window else None

    def tick(self, load: EngineLoad, totals: EngineTotals, *, idle: bool) -> None:
        """After each turn of the loop."""
        if totals != self._totals:
            for name, total, before in zip(EngineTotals._fields, totals, self._totals, strict=True):
                if total > before:
                    self._recorder.count(f"{name}_total", total - before, self._labels)
            self._totals = totals
        now = time.monotonic()
        if now < self._next_flush and not (idle and (self._recorder.dirty or load != self._published)):
            return
        self._next_flush = now + FLUSH_SECONDS
        self._gauges(now, load)
        self._recorder.flush()

    def _gauges(self, now: float, load: EngineLoad) -> None:
        while self._window and self._window[0][0] < now - RATE_WINDOW_SECONDS:
            self._window.popleft()
        rate = sum(tokens for _, tokens in self._window) / RATE_WINDOW_SECONDS
        if rate != self._rate_published:
            self._rate_published = rate
            self._recorder.gauge("generation_tokens_per_second", rate, self._labels)
        if load != self._published:
            self._published = load
            self._recorder.gauge("requests_running", load.running, self._labels)
            self._recorder.gauge("requests_waiting", load.waiting, self._labels)
            self._recorder.gauge("kv_pages_used", load.pages_used, self._labels)
            self._recorder.gauge("kv_cache_usage_ratio", load.pages_used / self._info.pages, self._labels)
