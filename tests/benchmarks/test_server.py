"""What is made of a server's own counter."""

import pytest

from benchmarks.server import Count


def test_a_rate_is_that_between_the_looks_inside() -> None:
    count = Count([(9.7, 900.0), (10.2, 1000.0), (10.7, 1100.0), (11.2, 1250.0), (11.7, 9000.0)])
    assert count.tokens_per_second(10.0, 1.5) == pytest.approx(250.0)


def test_one_look_is_no_rate() -> None:
    with pytest.raises(ValueError, match="too short"):
        Count([(9.7, 900.0), (10.2, 1000.0)]).tokens_per_second(10.0, 0.4)
