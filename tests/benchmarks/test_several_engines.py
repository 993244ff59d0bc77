"""Two engines on the CPU beside one, and the death of one under load."""

import pytest

from benchmarks.several_engines import lengths, parse, run, show

LINE = [
    "--devices", "cpu", "cpu", "--workloads", "D", "--scale", "0.02", "--open", "2", "--workers", "1",
    "--seconds", "2", "--warm-up", "0.5", "--server-arguments", "--log-level", "error",
]  # fmt: skip


def test_lengths_are_those_of_the_workload() -> None:
    assert lengths("D", 1.0) == ["--prompt-tokens", "128", "--output-tokens", "1024-3072"]


def test_one_engine_is_compared_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--devices", "0"])
    assert "--devices" in capsys.readouterr().err


def test_a_killed_engine_costs_its_own_requests_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, death = rows = run(parse(LINE))
    assert [(row["workload"], row["devices"], row["concurrency"]) for row in (one, two)] == [
        ("D", ["cpu"], 2),
        ("D", ["cpu", "cpu"], 4),
    ]
    assert all(row["answers"] > 0 and row["failures"] == 0 for row in (one, two))
    # Within 2 s a counter that is a quarter of a second old may be an eighth off, and the machine is busy.
    assert all(row["server_tok_s"] == pytest.approx(row["tok_s"], rel=0.35) for row in (one, two))
    assert 1 <= death["failures"] <= death["held_by_the_dead"] + 1
    assert death["errors"] == {"status 503": death["failures"]}
    assert death["only_its_own_failed"]
    assert 0 < death["restart_s"] < 30
    show(rows)
    out = capsys.readouterr().out
    assert f"{death['failures']} failed" in out
    assert f"{two['server_tok_s'] / one['server_tok_s']:.2f}x" in out
