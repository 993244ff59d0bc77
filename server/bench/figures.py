"""From the workers' records to figures."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from server.bench.messages import Records
from server.bench.window import Seconds, join, tokens_inside

PERCENTILES = (50, 90, 99)


class ServiceLevel(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer has to keep to count for the goodput, in seconds; None: no matter."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @property
    def needs_stream(self) -> bool:
        """Whether only a streamed answer shows it."""
        return self.ttft is not None or self.tpot is not None


class ServiceLevelError(ValueError):
    """A service level that is not understood. The message says why."""


def parse_service_level(text: str) -> ServiceLevel:
    """Of `ttft=200ms,tpot=5ms,e2e=2s`. Raises ServiceLevelError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        unit = next((unit for unit in ("ms", "s") if value.endswith(unit)), "")
        try:
            seconds = float(value.removesuffix(unit)) * {"ms": 1e-3, "s": 1.0}[unit]
        except (ValueError, KeyError):
            seconds = math.nan
        if name not in ServiceLevel.__struct_fields__ or name in limits or not 0 < seconds < math.inf:
            raise ServiceLevelError(f"{part.strip()} is no part of a service level like ttft=200ms,tpot=5ms,e2e=2s")
        limits[name] = seconds
    return ServiceLevel(**limits)


def figures(
    records: Sequence[Records], *, start: float, end: float | None, service_level: ServiceLevel | None
) -> dict[str, Any]:
    """What was measured between two moments; None stands for the end of the last answer. Latencies in ms.

    Answers, their latencies and the goodput are of what ended between the two, tokens of what came between them
    (`server.bench.window`).
    ttft: from the request to the first text. tpot: from the first delivery to the last, divided by the tokens but one.
    itl: the gap between two deliveries, however many tokens a delivery has. e2e: from the request to the whole answer.
    """
    ended, end_to_end, first_token = (join(records, name) for name in ("ended", "end_to_end", "first_token"))
    answers = len(ended)
    if end is None:
        end = float(ended.max()) if answers else start
    seconds = max(end - start, 1e-9)
    tokens, prompt_tokens = tokens_inside(records, start, end)
    # The time per token of an answer of one token is not defined.
    intervals = join(records, "output_tokens") - 1
    tpot = np.divide(join(records, "last_token"), intervals, out=np.full(answers, np.nan), where=intervals > 0)
    errors: Counter[str] = Counter()
    for one in records:
        errors.update(one.errors)
    row: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "answers": answers,
        "failures": errors.total(),
        "errors": dict(sorted(errors.items())),
        "unfinished": sum(one.unfinished for one in records),
        "requests_s": round(answers / seconds, 3),
        "tok_s": round(tokens / seconds, 1),
        "prompt_tok_s": round(prompt_tokens / seconds, 1),
        "tokens": round(tokens),
        "prompt_tokens": round(prompt_tokens),
        "ttft_ms": spread(first_token),
        "tpot_ms": spread(tpot),
        "itl_ms": spread(join(records, "gaps")),
        "e2e_ms": spread(end_to_end),
    }
    if service_level is not None:
        good = _good(service_level, first_token, tpot, end_to_end)
        row["goodput_requests_s"] = round(good / seconds, 3)
        row["goodput_share"] = round(good / max(1, answers + errors.total()), 4)
    return row


def spread(values: Seconds) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds of what is a number; None where nothing is."""
    values = values[~np.isnan(values)] * 1e3
    if not len(values):
        return None
    points = np.percentile(values, PERCENTILES)
    named = {f"p{place}": round(float(point), 4) for place, point in zip(PERCENTILES, points, strict=True)}
    return {"mean": round(float(values.mean()), 4), **named}


def _good(level: ServiceLevel, first_token: Seconds, tpot: Seconds, end_to_end: Seconds) -> int:
    """How many answers keep the level. Without a first token it is missed; a single token has no tpot to miss."""
    kept = np.ones(len(end_to_end), dtype=bool)
    if level.ttft is not None:
        kept &= first_token <= level.ttft
    if level.tpot is not None:
        kept &= (tpot <= level.tpot) | np.isnan(tpot)
    if level.e2e is not None:
        kept &= end_to_end <= level.e2e
    return int(kept.sum())
