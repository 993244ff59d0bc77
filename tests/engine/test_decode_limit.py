from engine.decode_limit import RECOVERY_STEPS, DecodeLimit


def steps(limit: DecodeLimit, count: int) -> None:
    for _ in range(count):
        limit.step_done()


def test_halves_down_to_one_row() -> None:
    limit = DecodeLimit(12)
    sizes = []
    for _ in range(5):
        limit.ran_out(limit.rows)
        sizes.append(limit.rows)
    assert sizes == [6, 3, 2, 1, 1]


def test_a_smaller_batch_that_does_not_fit_counts_as_it_is() -> None:
    limit = DecodeLimit(64)
    limit.ran_out(10)
    assert limit.rows == 5


def test_grows_back_after_a_while_without_a_shortage() -> None:
    limit = DecodeLimit(12)
    limit.ran_out(12)
    limit.ran_out(6)
    steps(limit, RECOVERY_STEPS - 1)
    assert limit.rows == 3
    steps(limit, 1)
    assert limit.rows == 6
    steps(limit, RECOVERY_STEPS)
    assert limit.rows == 12
    steps(limit, 2 * RECOVERY_STEPS)
    assert limit.rows == 12


def test_a_shortage_starts_the_wait_anew() -> None:
    limit = DecodeLimit(8)
    limit.ran_out(8)
    steps(limit, RECOVERY_STEPS - 1)
    limit.ran_out(4)
    steps(limit, RECOVERY_STEPS - 1)
    assert limit.rows == 2
