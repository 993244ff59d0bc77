import pytest

from benchmarks.harness import engine_config
from benchmarks.models import Workload
from benchmarks.prefix import least_found, measure_model, parse, sharing_requests, show
from tests.benchmarks.tiny import MODEL

LINE = ["--device", "cpu", "--dtype", "float32", "--max-step-positions", "64"]
SIZES = ["--requests", "12", "--shared", "130", "--own", "5", "--answer", "8"]


def test_prompts_share_so_many_tokens_and_no_more() -> None:
    first, second, third = (r.prompt_token_ids for r in sharing_requests(Workload("w", 40, 4), 30, 3, 64, seed=1))
    assert first[:30] == second[:30] == third[:30]
    assert len({first[30:], second[30:], third[30:]}) == 3
    assert len(first) == len(second) == 40


def test_what_has_to_be_found_is_in_whole_pages() -> None:
    config = engine_config(MODEL, parse(LINE), max_waiting=4)
    assert config.page_size == 16
    # 64 tokens a page, of which one is padding in the first.
    assert least_found(config, 4, Workload("w", 135, 8), shared=130, number=12) == 11 * 127
    assert least_found(config, 4, Workload("w", 40, 8), shared=30, number=12) == 0


def test_rows_have_the_form_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    cached, plain = measure_model(MODEL, parse([*LINE, *SIZES]))
    assert (cached["prefix_cache"], plain["prefix_cache"]) == (True, False)
    assert (cached["queried_tokens"], cached["found_tokens"]) == (12 * 135, 11 * 127)
    assert (plain["queried_tokens"], plain["found_tokens"]) == (0, 0)
    assert cached["tok_s"] == pytest.approx(12 * 8 / cached["seconds"])
    assert cached["steps"] < plain["steps"]
    show([cached, plain])
    assert "off" in capsys.readouterr().out
