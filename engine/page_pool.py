"""Which pages of the KV cache are free, and how many holders each of the others has. Plain integers, no memory."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq


class OutOfPagesError(Exception):
    """More pages were asked for than are free."""


class PagePool:
    """Pages 1..capacity. Page 0 is the null page, where padding writes: it is never handed out.

    A page has one holder after `allocate`, one more after each `share`, and is free again once every holder has
    released it.
    """

    def __init__(self, capacity: int, order: Seq[int] | None = None) -> None:
        """`order` is the one in which pages are handed out at first, by default ascending.

        Raises ValueError where it is no permutation of the pages.
        """
        if capacity < 1:
            raise ValueError(f"a pool needs at least one page, not {capacity}")
        self.capacity = capacity
        self._free = list(range(capacity, 0, -1)) if order is None else list(reversed(order))
        if order is not None and sorted(order) != list(range(1, capacity + 1)):
            raise ValueError(f"the order has to name each of the pages 1..{capacity} once")
        self._holders = [0] * (capacity + 1)

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages with at least one holder."""
        return self.capacity - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages. Raises OutOfPagesError, and takes none, where fewer are free."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages asked for, {len(self._free)} of {self.capacity} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a holder to a page in use. Raises ValueError for a page that is not."""
        if not self._in_use(page):
            raise ValueError(f"page {page} is not in use and cannot be shared")
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one holder from each page; those without any become free. Raises ValueError for a page not in use."""
        for page in pages:
            if not self._in_use(page):
                raise ValueError(f"page {page} is not in use and cannot be released")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Compare with the pages that each holder believes to hold. Raises AssertionError on any difference."""
        held = Counter(page for pages in holders for page in pages)
        assert 0 not in held, "the null page has a holder"
        counted = {page: count for page, count in enumerate(self._holders) if count}
        assert counted == dict(held), f"the pool counts holders {counted}, but pages are held {dict(held)}"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        expected = set(range(1, self.capacity + 1)) - counted.keys()
        assert free == expected, f"free pages are {sorted(free)} and should be {sorted(expected)}"

    def _in_use(self, page: int) -> bool:
        return 0 < page <= self.capacity and self._holders[page] > 0
