"""Both load testers' figures, of runs that are given, side by side."""

import argparse
import asyncio
import json
import stat
from pathlib import Path

import pytest

from benchmarks import against_guidellm
from benchmarks.against_guidellm import FIGURES, by_guidellm, by_ourselves, compare, paced_server

REPORT = {
    "requests_per_second": 2.0,
    "output_tokens_per_second": 20.0,
    "time_to_first_token_ms": 30.0,
    "inter_token_latency_ms": 4.0,
    "request_latency": 0.5,
}


def options(guidellm: Path, requests: int = 6) -> argparse.Namespace:
    return argparse.Namespace(
        guidellm=str(guidellm), model=None, open=2, requests=requests, prompt_tokens=4, output_tokens=8, runs=1
    )


@pytest.fixture
def guidellm(tmp_path: Path) -> Path:
    """A command that reports REPORT of six requests, with a tokenizer and nothing of ours around."""
    metrics = {name: {"successful": {"mean": mean}} for name, mean in REPORT.items()}
    report = {"benchmarks": [{"metrics": {**metrics, "request_totals": {"successful": 6}}}]}
    (tmp_path / "report").write_text(json.dumps(report))
    command = tmp_path / "guidellm"
    command.write_text(
        "#!/bin/sh\nset -e\ntest -f tokenizer.json && test ! -e config.json && test ! -e engine\n"
        f'for word; do case $word in kind=json,path=*) cp {tmp_path}/report "${{word#*path=}}";; esac; done\n'
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return command


def test_guidellms_means_are_read_in_our_units(guidellm: Path) -> None:
    found = by_guidellm(options(guidellm), "http://x", "m")
    assert found == {"requests_s": 2.0, "tok_s": 20.0, "ttft_ms": 30.0, "tpot_ms": 4.0, "e2e_ms": 500.0}
    with pytest.raises(RuntimeError, match="successful"):
        by_guidellm(options(guidellm, requests=7), "http://x", "m")


def test_differences_are_shares_of_guidellms(guidellm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_guidellm, "by_ourselves", lambda *_: dict.fromkeys(FIGURES, 3.0))
    row = compare(options(guidellm), "http://x", "m", "s")
    assert row["requests_s"] == {"bench": 3.0, "guidellm": 2.0, "difference": 0.5}
    assert row["e2e_ms"]["difference"] == pytest.approx(3 / 500 - 1, abs=1e-4)


async def test_what_is_known_of_the_canned_server_is_found(guidellm: Path) -> None:
    async with paced_server() as url:
        found = await asyncio.to_thread(by_ourselves, options(guidellm), url, "canned")
    # Two blocks of four tokens, 20 ms each. A busy machine is late, never early.
    assert found["e2e_ms"] >= 39
    assert found["ttft_ms"] >= 19
    assert found["tpot_ms"] == pytest.approx((found["e2e_ms"] - found["ttft_ms"]) / 7, rel=0.2)
