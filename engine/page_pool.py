"""Which pages of the KV cache are free, and how many holders each of the others has. Plain integers, no memory."""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq


class OutOfPagesError(Exception):
    """More pages were asked for than are free."""


class PagePool:
    """Pages 1..capacity. Page 0 is the null page, where padding writes: it is never handed out.

    A page has one holder after `allocate`, one more after each `share`, and is free again once every holder has
    released it. One that is to be kept keeps its content while it is free, and can be shared again, until it is handed
    out, which kept pages are only when no others are free: whichever lost its last holder first goes first.
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
        self._kept = [False] * (capacity + 1)
        # A queue from which any page can be taken back: values mean nothing.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return len(self._free) + len(self._idle)

    @property
    def plain(self) -> int:
        """Free pages that are not kept: they are handed out ahead of those that are."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages with at least one holder."""
        return self.capacity - self.free

    @property
    def idle(self) -> list[int]:
        """Kept pages without a holder, the next to be handed out first."""
        return list(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages. Raises OutOfPagesError, and takes none, where fewer are free."""
        if count > self.free:
            raise OutOfPagesError(f"{count} pages asked for, {self.free} of {self.capacity} free")
        # As if they were popped one by one.
        pages = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - len(pages) :]
        while len(pages) < count:
            page, _ = self._idle.popitem(last=False)
            self._kept[page] = False
            pages.append(page)
        holders = self._holders
        for page in pages:
            holders[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a holder to a page that is in use or kept. Raises ValueError for any other."""
        if not (self._in_use(page) or page in self._idle):
            raise ValueError(f"page {page} is neither in use nor kept and cannot be shared")
        self._idle.pop(page, None)
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one holder from each page; those without any become free. Raises ValueError for a page not in use."""
        capacity, holders, kept, idle, free = self.capacity, self._holders, self._kept, self._idle, self._free
        # `_in_use` is spelled out here and in `_mark`: of 4000 pages a step the calls would be a third of the time.
        for page in pages:
            if not (0 < page <= capacity and holders[page]):
                raise ValueError(f"page {page} is not in use and cannot be released")
            holders[page] -= 1
            if holders[page]:
                continue
            if kept[page]:
                idle[page] = None
            else:
                free.append(page)

    def keep(self, pages: Iterable[int]) -> None:
        """Keep the content of pages in use once they are free. Raises ValueError for a page not in use."""
        self._mark(pages, kept=True)

    def drop(self, pages: Iterable[int]) -> None:
        """Take back `keep`, of pages in use. Raises ValueError for a page not in use."""
        self._mark(pages, kept=False)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def freed_by(self, leaving: Iterable[Iterable[int]]) -> int:
        """How many pages become free where these holders, each with its pages, release all of them."""
        counts = Counter(page for pages in leaving for page in pages)
        return sum(self._holders[page] == count for page, count in counts.items())

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Compare with the pages that each holder believes to hold. Raises AssertionError on any difference."""
        held = Counter(page for pages in holders for page in pages)
        assert 0 not in held, "the null page has a holder"
        counted = {page: count for page, count in enumerate(self._holders) if count}
        assert counted == dict(held), f"the pool counts holders {counted}, but pages are held {dict(held)}"
        free = {*self._free, *self._idle}
        assert len(free) == len(self._free) + len(self._idle), "a page is free twice"
        expected = set(range(1, self.capacity + 1)) - counted.keys()
        assert free == expected, f"free pages are {sorted(free)} and should be {sorted(expected)}"
        assert all(self._kept[page] for page in self._idle), "a page is free as one to be kept, which it is not"
        assert not any(self._kept[page] for page in self._free), "a page that is to be kept is free as any other"

    def _mark(self, pages: Iterable[int], *, kept: bool) -> None:
        capacity, holders, marks = self.capacity, self._holders, self._kept
        for page in pages:
            if not (0 < page <= capacity and holders[page]):
                raise ValueError(f"page {page} is not in use and cannot be {'kept' if kept else 'dropped'}")
            marks[page] = kept

    def _in_use(self, page: int) -> bool:
        return 0 < page <= self.capacity and self._holders[page] > 0
