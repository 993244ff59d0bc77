import pytest
from rich.console import Console

from benchmarks.anchors import VLLM, VLLM_SINGLE, pairs_table, vllm_row, vllm_single
from benchmarks.models import CONTROLS, WORKLOADS


def test_every_pair_has_an_anchor_for_every_workload() -> None:
    assert set(CONTROLS.values()) == set(VLLM) == set(VLLM_SINGLE)
    assert all(figures.keys() == WORKLOADS.keys() for figures in VLLM.values())


def test_a_block_model_is_compared_with_the_vanilla_model_of_its_quality() -> None:
    assert vllm_row("block-1.2B", "D") == vllm_row("vanilla-302M", "D") == 26_083
    assert vllm_row("tiny", "D") is None
    assert vllm_single("block-85M") == vllm_single("vanilla-19M") == (682, 4.2)
    assert vllm_single("tiny") == (None, None)


def test_both_ratios_of_a_pair_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"model": "block-1.2B", "workload": "D", "tok_s": 130_415.0},
        {"model": "vanilla-302M", "workload": "D", "tok_s": 52_166.0},
        {"model": "block-85M", "workload": "D", "tok_s": 1.0},
        {"model": "vanilla-302M", "workload": "P", "tok_s": 1.0},
    ]
    table = pairs_table(rows)
    assert table is not None
    assert len(table.rows) == 1
    Console(width=120).print(table)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("130,415", "52,166", "2.50x", "26,083", "5.00x"))


def test_where_no_pair_was_run_there_is_no_table() -> None:
    assert pairs_table([{"model": "block-1.2B", "workload": "D", "tok_s": 1.0}]) is None
