"""The engine's benchmark through its real code, with a model of a few thousand parameters."""

import argparse
import json

import pytest
import torch

from benchmarks.device_waits import counted_waits
from benchmarks.engine import measure_model, parse, profile_model, show
from benchmarks.harness import engine_config, loaded_core, make_requests, run_requests
from benchmarks.models import WORKLOADS, Workload
from benchmarks.profile import (
    Profile,
    busy_time,
    decode_workload,
    group_of,
    prefill_number,
    prefill_workload,
    profile_steps,
)
from tests.benchmarks.tiny import MODEL, TINY


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(WORKLOADS, "P", Workload("P", prompt_tokens=66, answer_tokens=8))
    monkeypatch.setitem(WORKLOADS, "D", Workload("D", prompt_tokens=8, answer_tokens=42))
    return parse(["--device", "cpu", "--dtype", "float32", "--workloads", "P", "D", "--max-step-positions", "32"])


def test_a_row_has_the_form_of_a_result(arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(measure_model(MODEL, arguments))
    assert [row["workload"] for row in rows] == ["P", "D"]
    for row, answer_tokens in zip(rows, (8, 42), strict=True):
        assert row.keys() >= {
            "bench", "model", "workload", "dtype", "device", "devices", "requests", "rows", "tok_s", "floor_tok_s",
            "seconds", "commit", "torch", "triton", "date", "steps", "host_ms_per_step", "preemptions", "sampling",
        }  # fmt: skip
        assert (row["bench"], row["model"], row["device"], row["requests"]) == ("engine", "tiny", "cpu", 8)
        assert row["tok_s"] * row["seconds"] == pytest.approx(8 * answer_tokens)
        # A prompt of 17 positions costs 20 for its attention, and answers of two blocks end before a fourth one begins.
        assert row["rows"] == {"P": 3, "D": 4}[row["workload"]]
        # 8 answers of 11 blocks by 4 rows at most.
        assert row["steps"] >= 2 * -(-answer_tokens // 4)
        assert row["floor_tok_s"] is None, "floors are an H200's"
        json.dumps(row)
    show(rows)
    printed = capsys.readouterr().out
    assert "tiny" in printed
    assert "n/a" in printed


def test_quick_halves_the_requests(arguments: argparse.Namespace) -> None:
    arguments.quick = True
    assert [row["requests"] for row in measure_model(MODEL, arguments)] == [4, 4]


def test_sampled_answers_are_measured_and_recorded(arguments: argparse.Namespace) -> None:
    arguments.sampling = "top"
    rows = list(measure_model(MODEL, arguments))
    assert [row["sampling"] for row in rows] == ["top", "top"]
    (request,) = make_requests(Workload("P", 12, 4), 1, vocab_size=64, sampling="top")
    assert (request.params.temperature, request.params.top_k, request.params.top_p) == (0.8, 50, 0.9)


def test_a_floor_measured_here_stands_in_for_the_known_one(
    arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.floor.copy_bandwidth", lambda device: 1e9)
    arguments.floor, arguments.workloads = True, ["D"]
    rows = list(measure_model(MODEL, arguments))
    assert rows[0]["floor_measured_here"]
    assert rows[0]["floor_tok_s"] > 0
    show(rows)
    assert "(here)" in capsys.readouterr().out


def test_prompts_differ_and_are_the_same_every_time() -> None:
    first, second = (make_requests(Workload("P", 12, 4), 3, vocab_size=64, seed=7) for _ in range(2))
    prompts = [request.prompt_token_ids for request in first]
    assert prompts == [request.prompt_token_ids for request in second]
    assert len(set(prompts)) == 3
    assert len({request.request_id for request in (*first, *second)}) == 6


def test_an_engine_short_of_pages_reports_its_preemptions(arguments: argparse.Namespace) -> None:
    config = engine_config(MODEL, arguments, max_waiting=64)
    page_bytes = 2 * 32 * 16 * 4
    # Each row comes to need four pages.
    config = config.model_copy(update={"kv_bytes": (1 + 10) * page_bytes})
    with loaded_core(MODEL, config) as core:
        assert core.info.pages == 10
        run = run_requests(core, make_requests(Workload("D", 8, 240), 8, TINY.vocab_size))
    assert run.preemptions > 0
    assert run.tokens == 8 * 240


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_profile_accounts_for_the_whole_span(
    kind: str, arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    config = engine_config(MODEL, arguments, max_waiting=1024)
    with loaded_core(MODEL, config) as core:
        if kind == "decode":
            requests = make_requests(Workload("D", 16, 200), 4, TINY.vocab_size)
        else:
            workload = prefill_workload(Workload("P", 66, 8), TINY.block_length)
            requests = make_requests(workload, prefill_number(workload, 4, config), TINY.vocab_size)
        result = profile_steps(core, requests, torch.device("cpu"), kind)
        assert not core.has_work
    assert result.groups["matrix products"] > 0
    assert 0 < result.necessary_share < 1
    assert sum(result.groups.values()) + result.gaps == pytest.approx(result.span, rel=0.01)
    printed = capsys.readouterr().out
    assert "matrix products" in printed
    assert "of which the host works" in printed


def test_products_and_the_reading_of_kv_are_what_a_step_cannot_do_without() -> None:
    groups = {"matrix products": 6.0, "decode attention": 2.0, "sampler": 1.0, "norms": 1.0}
    assert Profile(1, groups, {}, 0.0, 10.0).necessary_share == 0.8


def test_decode_steps_are_profiled_in_the_middle_of_answers(
    arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    config = engine_config(MODEL, arguments, max_waiting=1)
    workload = decode_workload(Workload("D", 8, 42), TINY.block_length, config)
    assert workload.prompt_tokens == 28
    # A budget of 32 positions, four of them decodes, takes a step for each row's 7 blocks.
    assert workload.answer_tokens == 4 * (1 + 4 + 32 + 8)
    arguments.profile, arguments.workloads = "decode", ["D"]
    profile_model(MODEL, arguments)
    assert "prompts of 28 tokens, 4 rows decode" in " ".join(capsys.readouterr().out.split())


def test_prompts_too_few_for_a_profile_are_refused(arguments: argparse.Namespace) -> None:
    config = engine_config(MODEL, arguments, max_waiting=64)
    with loaded_core(MODEL, config) as core, pytest.raises(RuntimeError, match="ended before the steps"):
        profile_steps(core, make_requests(Workload("P", 8, 4), 4, TINY.vocab_size), torch.device("cpu"), "prefill")


def test_answers_too_short_for_a_profile_are_refused(arguments: argparse.Namespace) -> None:
    config = engine_config(MODEL, arguments, max_waiting=64)
    with loaded_core(MODEL, config) as core, pytest.raises(RuntimeError, match="before every row was decoding"):
        profile_steps(core, make_requests(Workload("D", 8, 4), 4, TINY.vocab_size), torch.device("cpu"))


def test_overlapping_spans_are_counted_once() -> None:
    assert busy_time([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_kernels_are_told_apart() -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT": "matrix products",
        "_attend_split": "decode attention",
        "_attend_tile": "prefill attention",
        "_attend_and_gelu": "local attention",
        "sample_groups": "sampler",
        "sample_row": "sampler",
        "sample_vocabulary": "sampler",
        "_norm_row": "norms",
        "_gelu_tile": "gelu",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>": "gelu",
        "void at::native::index_elementwise_kernel": "other",
    }
    assert {name: group_of(name) for name in names} == names


def test_waiting_is_counted_only_while_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.cuda.Event] = []

    def synchronize(event: torch.cuda.Event) -> None:
        calls.append(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", synchronize)
    event = object.__new__(torch.cuda.Event)
    with counted_waits() as waits:
        event.synchronize()
    inside = waits.seconds
    event.synchronize()
    assert calls == [event, event]
    assert waits.seconds == inside > 0
