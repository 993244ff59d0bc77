from collections import Counter

import numpy as np
import pytest

from benchmarks.models import Workload
from benchmarks.traffic import (
    LONGEST,
    fixed_requests,
    log_normal,
    mixed_requests,
    poisson,
    shuffled_pool,
    wanted_tokens,
)

WORKLOAD = Workload("D", prompt_tokens=40, answer_tokens=100)


def generator() -> np.random.Generator:
    return np.random.default_rng(5)


def test_lengths_have_the_mean_and_an_end() -> None:
    lengths = log_normal(100, 2000, generator())
    assert np.mean(lengths) == pytest.approx(100, rel=0.01)
    assert min(lengths) >= 1
    assert max(lengths) == 100 * LONGEST
    assert 0.4 < np.std(np.log(lengths)) < 0.6


def test_arrivals_come_at_the_rate_and_at_random() -> None:
    moments = poisson(50.0, 4000, generator())
    between = np.diff(moments)
    assert moments[-1] == pytest.approx(4000 / 50)
    assert (between > 0).all()
    assert np.std(between) == pytest.approx(np.mean(between), rel=0.1)


def test_a_third_of_the_requests_is_chosen_in_each_way() -> None:
    requests = mixed_requests(WORKLOAD, 300, 64, generator())
    ways = Counter((request.params.temperature, request.params.top_k, request.params.top_p) for request in requests)
    assert ways == {(0.0, 0, 1.0): 100, (1.0, 0, 1.0): 100, (0.8, 50, 0.9): 100}
    assert not any(request.params.ignore_eos for request in requests)
    assert {request.params.max_tokens for request in requests} == {300}
    assert wanted_tokens(requests) == pytest.approx(300 * 100, rel=0.01)


def test_fixed_requests_go_on_to_their_length() -> None:
    assert wanted_tokens(fixed_requests(WORKLOAD, 3, 64, generator())) == 300


def test_a_shuffled_pool_has_every_page_in_another_order() -> None:
    pages = shuffled_pool(100).allocate(100)
    assert sorted(pages) == list(range(1, 101))
    assert sum(after == before + 1 for before, after in zip(pages, pages[1:], strict=False)) < 10
