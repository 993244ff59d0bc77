"""What the workers recorded, as figures."""

import math
from array import array
from typing import Any

import pytest

from server.bench.figures import ServiceLevel, ServiceLevelError, figures, parse_service_level
from server.bench.messages import Records, Sums

COLUMNS: dict[str, list[float]] = {
    "ended": [1.0, 2.0, 3.0],
    "end_to_end": [0.2, 0.4, 0.1],
    "first_token": [0.05, 0.2, 0.1],
    "last_token": [0.1, 0.2, 0.0],
    "prompt_tokens": [5, 6, 7],
    "output_tokens": [11, 21, 1],
    "delivered": [2, 3, 1],
    "delivered_inside": [2, 3, 1],
    "gaps": [0.01, 0.03],
    "failed_after": [],
}


def packed(values: list[float]) -> bytes:
    return array("d", values).tobytes()


def records(**fields: Any) -> Records:
    """Of three answers, of 11, 21 and 1 tokens, that ended at 1, 2 and 3 s."""
    plain: dict[str, Any] = {"errors": {}, "earlier": Sums(), "cpu_seconds": 1.0}
    plain |= {"unfinished": 0, "open_seconds": 0.0, "open_deliveries": 0}
    plain |= {name: value for name, value in fields.items() if name in plain}
    columns = COLUMNS | {name: value for name, value in fields.items() if name in COLUMNS}
    return Records(**{name: packed(values) for name, values in columns.items()}, **plain)  # type: ignore[arg-type]


def test_throughput_is_of_the_measured_seconds() -> None:
    row = figures([records(), records()], start=0.0, end=4.0, service_level=None)
    assert (row["seconds"], row["answers"], row["tokens"], row["prompt_tokens"]) == (4.0, 6, 66, 36)
    assert (row["requests_s"], row["tok_s"], row["prompt_tok_s"]) == (1.5, 16.5, 9.0)


def test_without_an_end_the_last_answer_is_it() -> None:
    assert figures([records()], start=1.0, end=None, service_level=None)["seconds"] == 2.0


def test_percentiles_are_those_between_the_sorted_values() -> None:
    hundred = [number / 1000 for number in range(101)]
    columns = ("ended", "end_to_end", "first_token", "last_token", "prompt_tokens", "output_tokens", "delivered")
    row = figures(
        [records(**{name: list(reversed(hundred)) for name in (*columns, "delivered_inside")})],
        start=0.0,
        end=1.0,
        service_level=None,
    )
    assert row["e2e_ms"] == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert row["ttft_ms"] == row["e2e_ms"]


def test_the_time_of_a_token_leaves_the_first_out_and_needs_a_second() -> None:
    row = figures([records()], start=0.0, end=4.0, service_level=None)
    assert row["tpot_ms"]["mean"] == pytest.approx(10.0)
    assert row["tpot_ms"]["p99"] == pytest.approx(10.0)
    assert row["itl_ms"]["p50"] == pytest.approx(20.0)


def test_whole_answers_have_no_times_between() -> None:
    nothing = [math.nan] * 3
    row = figures([records(first_token=nothing, last_token=nothing, gaps=[])], start=0.0, end=4.0, service_level=None)
    assert (row["ttft_ms"], row["tpot_ms"], row["itl_ms"]) == (None, None, None)
    assert row["e2e_ms"] is not None


def test_no_answer_at_all() -> None:
    empty = records(**{name: [] for name in COLUMNS}, errors={"status 500": 3})
    row = figures([empty], start=0.0, end=None, service_level=ServiceLevel(e2e=1.0))
    assert (row["answers"], row["failures"], row["tok_s"], row["goodput_share"]) == (0, 3, 0.0, 0.0)


def test_errors_add_up() -> None:
    parts = [
        records(errors={"status 429": 2}, unfinished=1),
        records(errors={"timeout": 1, "status 429": 1}, unfinished=2),
    ]
    row = figures(parts, start=0.0, end=4.0, service_level=None)
    assert (row["errors"], row["failures"], row["unfinished"]) == ({"status 429": 3, "timeout": 1}, 4, 3)


@pytest.mark.parametrize(
    ("level", "good"),
    [
        (ServiceLevel(ttft=0.1), 2),
        (ServiceLevel(tpot=0.0099), 1),  # the answer of one token has none to miss
        (ServiceLevel(tpot=0.011), 3),
        (ServiceLevel(e2e=0.25), 2),
        (ServiceLevel(ttft=0.1, e2e=0.15), 1),
    ],
)
def test_goodput_counts_the_answers_that_keep_every_limit(level: ServiceLevel, good: int) -> None:
    row = figures([records(errors={"status 500": 1})], start=0.0, end=2.0, service_level=level)
    assert row["goodput_requests_s"] == good / 2
    assert row["goodput_share"] == good / 4


def test_an_answer_without_a_first_token_misses_its_limit() -> None:
    row = figures(
        [records(first_token=[0.05, math.nan, 0.1])], start=0.0, end=1.0, service_level=ServiceLevel(ttft=1.0)
    )
    assert row["goodput_requests_s"] == 2


def test_a_service_level_is_read() -> None:
    assert parse_service_level("ttft=200ms, e2e=1.5s") == ServiceLevel(ttft=0.2, e2e=1.5)
    assert parse_service_level("tpot=5ms").needs_stream
    assert not parse_service_level("e2e=5s").needs_stream


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttft=-1s", "itl=5ms", "e2e=1s,e2e=2s", "e2e=nans"])
def test_a_service_level_that_is_none(text: str) -> None:
    with pytest.raises(ServiceLevelError, match="is no part of a service level"):
        parse_service_level(text)
