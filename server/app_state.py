"""All that the HTTP front end works with, passed to it by whoever starts it."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from engine.client import EngineClient
from engine.messages import ServiceState
from engine.metrics import MetricsRecorder
from engine.tokenizer import Tokenizer
from server.settings import ServeSettings
from server.version import VersionInfo, version_info

RenderMetrics = Callable[[bool], Awaitable[tuple[str, bytes]]]
"""Renders the registry, as OpenMetrics if true; returns content type and body. Raises OSError if its owner is gone."""


@dataclass(kw_only=True)
class AppState:
    """One API process. `service` is replaced whenever the supervisor says that something changed."""

    engine: EngineClient
    tokenizer: Tokenizer
    settings: ServeSettings
    metrics: MetricsRecorder
    render_metrics: RenderMetrics
    service: ServiceState = field(default_factory=lambda: ServiceState(healthy=True, engines_up=0, draining=False))
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time; what clients see as the model's creation."""
    version: VersionInfo = field(default_factory=version_info)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names clients may use for the model; the first is the default."""
        return self.settings.model_names()
