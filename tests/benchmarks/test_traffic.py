from collections import Counter

import numpy as np
import pytest

from benchmarks.models import Workload
from benchmarks.traffic import (
    LONGEST,
    Traffic,
    fixed_requests,
    log_normal,
    mixed_requests,
    poisson,
    shuffled_pool,
    underway_requests,
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


def test_requests_under_way_are_what_one_finds_at_a_random_moment() -> None:
    found = underway_requests(WORKLOAD, 3000, 64, generator())
    remaining = np.array([wanted_tokens([request]) for request in found])
    written = np.array([len(request.prompt_token_ids) for request in found]) - 40
    ends = np.array([request.params.max_tokens for request in found])
    # By renewal theory, half of E[length^2] / E[length] is done on average and as much is still to come.
    lengths = np.array(log_normal(100, 4000, generator()), float)
    half = (lengths**2).mean() / lengths.mean() / 2
    assert remaining.mean() == pytest.approx(half, rel=0.03)
    assert written.mean() == pytest.approx(half, rel=0.03)
    assert remaining.min() == 1
    # P(remaining > x) = E[(length - x)+] / E[length].
    for x in (50, 100, 200):
        assert (remaining > x).mean() == pytest.approx(np.maximum(lengths - x, 0).mean() / 100, abs=0.03)
    # Room is left for the longest answer, as at its start.
    assert (remaining <= ends).all()
    assert 300 - ends.mean() == pytest.approx(written.mean(), rel=0.01)
    assert len({request.params.temperature for request in found}) == 3


def test_traffic_brings_what_it_offers() -> None:
    arrivals = Traffic(WORKLOAD, 64, 5000.0, generator()).arrivals(400)
    assert wanted_tokens([arrival.request for arrival in arrivals]) / arrivals[-1].seconds == pytest.approx(5000)
    assert len({arrival.request.request_id for arrival in arrivals}) == 400


def test_no_requests_are_none() -> None:
    assert mixed_requests(WORKLOAD, 0, 64, generator()) == []
    assert underway_requests(WORKLOAD, 0, 64, generator()) == []


def test_fixed_requests_go_on_to_their_length() -> None:
    assert wanted_tokens(fixed_requests(WORKLOAD, 3, 64, generator())) == 300


def test_a_shuffled_pool_has_every_page_in_another_order() -> None:
    pages = shuffled_pool(100).allocate(100)
    assert sorted(pages) == list(range(1, 101))
    assert sum(after == before + 1 for before, after in zip(pages, pages[1:], strict=False)) < 10
