import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.page_pool import OutOfPagesError, PagePool


def test_every_page_but_the_null_page_is_handed_out_once() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(2) + pool.allocate(3)) == [1, 2, 3, 4, 5]
    assert (pool.free, pool.used, pool.capacity) == (0, 5, 5)


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(OutOfPagesError, match="3 pages asked for, 2 of 3 free"):
        pool.allocate(3)
    assert pool.free == 2


def test_pages_come_in_the_order_that_was_asked_for() -> None:
    assert PagePool(3).allocate(3) == [1, 2, 3]
    pool = PagePool(3, order=[3, 1, 2])
    assert pool.allocate(2) == [3, 1]
    pool.check_integrity([[3, 1]])


@pytest.mark.parametrize("order", [[1, 2], [1, 2, 2], [0, 1, 2], [1, 2, 3, 4]])
def test_an_order_has_to_name_every_page_once(order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"each of the pages 1\.\.3 once"):
        PagePool(3, order)


def test_a_shared_page_is_free_after_its_last_release() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.share(page)
    pool.release([page])
    assert pool.free == 0
    pool.release([page])
    assert pool.free == 1


def test_a_kept_page_can_be_shared_again_until_it_is_handed_out() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(2)
    pool.keep([first, second])
    pool.release([second, first])
    assert (pool.free, pool.used, pool.idle) == (3, 0, [second, first])
    pool.share(second)
    assert (pool.free, pool.idle, pool.holders(second)) == (2, [first], 1)
    pool.check_integrity([[second]])


def test_kept_pages_are_handed_out_last_and_in_the_order_in_which_they_became_free() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    for page in pages:
        pool.keep([page])
    pool.release([2, 1, 3])
    assert [pool.allocate(1) for _ in range(4)] == [[4], [2], [1], [3]]
    pool.release([1])
    assert pool.idle == [], "what was handed out is kept no longer"


def test_free_pages_that_are_not_kept_are_counted_and_come_first() -> None:
    pool = PagePool(5)
    pool.keep(pool.allocate(3)[:2])
    pool.release([1, 2, 3])
    assert (pool.free, pool.plain) == (5, 3)
    assert pool.allocate(4) == [3, 4, 5, 1]
    assert (pool.free, pool.plain, pool.idle) == (1, 0, [2])
    assert pool.allocate(0) == []
    pool.check_integrity([[3, 4, 5, 1]])


def test_one_release_takes_a_holder_each_time_it_names_a_page() -> None:
    pool = PagePool(2)
    pool.allocate(2)
    pool.share(1)
    pool.release([1, 2, 1])
    assert pool.free == 2
    pool.allocate(2)
    with pytest.raises(ValueError, match="page 1 is not in use and cannot be released"):
        pool.release([1, 1])
    pool.check_integrity([[2]])


def test_a_page_that_was_dropped_is_free_as_any_other() -> None:
    pool = PagePool(1)
    pool.allocate(1)
    pool.keep([1])
    pool.drop([1])
    pool.release([1])
    assert (pool.idle, pool.free) == ([], 1)


def test_pages_that_several_hold_are_freed_by_all_of_them_alone() -> None:
    pool = PagePool(3)
    pages = pool.allocate(3)
    pool.share(pages[0])
    assert pool.freed_by([pages]) == 2
    assert pool.freed_by([pages, pages[:1]]) == 3


@pytest.mark.parametrize("page", [0, 1, 4, -1])
def test_pages_that_are_not_in_use_are_neither_released_nor_shared(page: int) -> None:
    pool = PagePool(3)
    with pytest.raises(ValueError, match="released"):
        pool.release([page])
    with pytest.raises(ValueError, match="shared"):
        pool.share(page)
    with pytest.raises(ValueError, match="kept"):
        pool.keep([page])
    with pytest.raises(ValueError, match="dropped"):
        pool.drop([page])


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)


@pytest.mark.parametrize("holders", [[], [[1, 1]], [[1], [1]], [[1, 2]], [[0, 1]]])
def test_the_integrity_check_finds_wrong_holders(holders: list[list[int]]) -> None:
    pool = PagePool(2)
    assert pool.allocate(1) == [1]
    pool.check_integrity([[1]])
    with pytest.raises(AssertionError):
        pool.check_integrity(holders)


class PoolMachine(RuleBasedStateMachine):
    """Holders allocate, share, keep and release at random; the pool has to agree with them at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.holders: list[list[int]] = []
        self.kept: list[int] = []
        """Pages to be kept, whichever lost its last holder first ahead; those in use anywhere behind."""

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        if count > self.pool.free:
            with pytest.raises(OutOfPagesError):
                self.pool.allocate(count)
        else:
            idle = [page for page in self.kept if page not in self.used]
            plain = self.pool.free - len(idle)
            pages = self.pool.allocate(count)
            assert pages[plain:] == idle[: max(count - plain, 0)], "kept pages come last, and the oldest of them first"
            self.kept = [page for page in self.kept if page not in pages]
            self.holders.append(pages)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from([pages for pages in self.holders if pages]))
        for page in pages:
            self.pool.share(page)
        self.holders.append(list(pages))

    @precondition(lambda self: bool(self.kept))
    @rule(data=st.data())
    def share_what_is_kept(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.kept))
        self.pool.share(page)
        self.holders.append([page])

    @precondition(lambda self: bool(self.used))
    @rule(data=st.data(), keep=st.booleans())
    def keep_or_drop(self, data: st.DataObject, *, keep: bool) -> None:
        page = data.draw(st.sampled_from(sorted(self.used)))
        (self.pool.keep if keep else self.pool.drop)([page])
        self.kept = [other for other in self.kept if other != page] + [page] * keep

    @precondition(lambda self: bool(self.holders))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        pages = self.holders.pop(index)
        self.pool.release(pages)
        for page in pages:
            if page in self.kept and page not in self.used:
                self.kept.remove(page)
                self.kept.append(page)

    @property
    def used(self) -> set[int]:
        """Pages that somebody holds."""
        return {page for pages in self.holders for page in pages}

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.holders)
        assert self.pool.used == len(self.used)
        assert self.pool.idle == [page for page in self.kept if page not in self.used]


TestPoolMachine = PoolMachine.TestCase
