"""Which pages hold the KV of which prompt prefixes, so that equal prefixes are computed once and shared.

A page's keys and values depend on every token from the sequence's start to the page's end, and on nothing else that
differs within one process. So its key is sha256(key of the page before || its content): the token ids, and in the first
page a request's salt. In front of that one is a secret that is drawn for the process: what one client's prompts are is
not to be found out by another's, and no key can be made in advance. Padding is among the tokens. A hit compares the
contents too, so even equal keys of different prefixes never serve one's pages to the other.

A page is published when the step that writes it is planned, so that requests which arrive together share it. Its
readers are in that step or in later ones, and steps run in order. Within a step it is sound too: each layer writes the
keys and values of all chunks before any of them attends, and where chunks run one by one, they run in the order of the
plan, in which the writer is ahead. Until that step is committed the page is pending: if its writer fails, `fail` says
which pages hold nothing, and whoever shares them has to begin again.
"""

import hashlib
import secrets
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable

from engine.page_pool import PagePool
from engine.sequence import Sequence

Digest = Callable[[bytes], bytes]


def sha256(data: bytes) -> bytes:
    """The digest of keys."""
    return hashlib.sha256(data).digest()


class PrefixCache:
    """Chains of published pages. Every page whose parent, the page before it, is published is found behind it.

    Holders of a page hold its parent too, and release it later, so a chain loses its tail first.
    """

    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool = True, digest: Digest = sha256) -> None:
        """`pool` hands out its pages through this cache alone. Not `enabled`, nothing is published or found."""
        self._pool = pool
        self._page_size = page_size
        self._enabled = enabled
        self._digest = digest
        self._secret = secrets.token_bytes(32)
        self._page_of: dict[bytes, int] = {}
        # By page. Lists of plain values rather than an object a page: the collector of garbage does not visit them.
        self._keys = [b""] * (pool.capacity + 1)
        self._contents = [b""] * (pool.capacity + 1)
        self._parents = [0] * (pool.capacity + 1)
        self._publications = [0] * (pool.capacity + 1)
        """The number of the page's present publication, which no other has; 0 where it is not published."""
        self._published = 0
        self._pending: deque[tuple[int, Sequence, list[int]]] = deque()
        """Pages whose step is not committed, in the order of publication: the step's number, the writer and they."""
        self._asked: Sequence | None = None
        self._found: list[tuple[int, int]] = []
        """What was found for the sequence that asked last: pages and their publications."""
        self.queried_tokens = 0
        """Prompt tokens of all requests that were admitted."""
        self.hit_tokens = 0
        """Those of them that were found."""

    def allocate(self, count: int) -> list[int]:
        """Take free pages, of which nothing is found any more. Raises OutOfPagesError."""
        plain = self._pool.plain
        pages = self._pool.allocate(count)
        # Of the free pages those alone are published that are kept, and these come last.
        self._forget(pages[plain:])
        return pages

    def enroll(self, sequence: Sequence) -> None:
        """Give a sequence the contents and keys of its prompt's whole pages that it has none of: a digest a page."""
        keys, contents, size = sequence.page_keys, sequence.page_contents, self._page_size
        # The last prompt block is decoded by its row, and so is not in a page that others can share.
        first, end = len(keys), sequence.prefill_end // size
        if first >= end or not self._enabled:
            return
        tokens = sequence.blocks[first * size : end * size].tobytes()
        length, digest = len(tokens) // (end - first), self._digest
        contents += [tokens[start : start + length] for start in range(0, len(tokens), length)]
        if not keys:
            contents[0] += sequence.request.cache_salt.encode("utf-8", "surrogatepass")
        key = keys[-1] if keys else self._secret
        keys += [key := digest(key + content) for content in contents[first:]]

    def find(self, sequence: Sequence) -> list[int]:
        """Pages of the longest published prefix of its prompt. Cheap where it asks again and little has changed."""
        if self._asked is not sequence:
            self._asked, self._found = sequence, []
        found = self._found
        # While a publication stands, those ahead of it in the chain do.
        while found and self._publications[found[-1][0]] != found[-1][1]:
            found.pop()
        while len(found) < len(sequence.page_keys):
            page = self._match(sequence, len(found), found[-1][0] if found else 0)
            if page is None:
                break
            found.append((page, self._publications[page]))
        return [page for page, _ in found]

    def held(self, pages: list[int]) -> int:
        """How many of the pages that `find` found have holders: all that have are ahead of those that have not."""
        return bisect_left(pages, 1, key=lambda page: not self._pool.holders(page))

    def take(self, sequence: Sequence, pages: list[int]) -> int:
        """Hold the pages that `find` found, for the sequence. Returns the tokens of its prompt in them."""
        self._asked, self._found = None, []
        if not pages:
            return 0
        for page in pages:
            self._pool.share(page)
        tokens: int = sequence.blocks[: len(pages) * self._page_size].size
        return max(tokens - sequence.padding, 0)

    def count(self, prompt_tokens: int, found_tokens: int) -> None:
        """A request was admitted."""
        if self._enabled:
            self.queried_tokens += prompt_tokens
            self.hit_tokens += found_tokens

    def publish(self, sequence: Sequence, start: int, end: int, step: int | None) -> None:
        """Publish the whole pages that positions `start` to `end` complete; `step` writes them, None: it is committed.

        A page ends the chain whose prefix another page has already, and whose parent is not published.
        """
        keys, contents, pages = sequence.page_keys, sequence.page_contents, sequence.pages
        first, last = start // self._page_size, min(end // self._page_size, len(keys))
        page_of, publications, published = self._page_of, self._publications, self._published
        parent = pages[first - 1] if first else 0
        # From here on it is: the loop ends at the first page that is not.
        if parent and not publications[parent]:
            return
        new = []
        for page, key, content in zip(pages[first:last], keys[first:last], contents[first:last], strict=True):
            if not publications[page]:
                if page_of.setdefault(key, page) != page:
                    break
                published += 1
                publications[page] = published
                self._keys[page], self._contents[page], self._parents[page] = key, content, parent
                new.append(page)
            parent = page
        self._published = published
        self._pool.keep(new)
        if new and step is not None:
            self._pending.append((step, sequence, new))

    def confirm(self, step: int) -> None:
        """The step is committed, and so is what it wrote, and steps before it."""
        while self._pending and self._pending[0][0] <= step:
            self._pending.popleft()

    def fail(self, writers: Collection[Sequence]) -> set[int]:
        """Unpublish what these did not write, and what was written from it. Returns those pages: all have holders."""
        spoiled: set[int] = set()
        for place, (step, writer, pages) in enumerate(self._pending):
            # All behind one in a chain are spoiled with it, and the pages of one writer are a chain.
            for page in pages:
                if writer in writers or self._parents[page] in spoiled:
                    spoiled.add(page)
            self._pending[place] = (step, writer, [page for page in pages if page not in spoiled])
        self._forget(spoiled)
        self._pool.drop(spoiled)
        return spoiled

    def check_integrity(self) -> None:
        """Raises AssertionError where chains are broken or disagree with the pool. Costs O(pages)."""
        published = [page for page, number in enumerate(self._publications) if number]
        assert self._page_of == {self._keys[page]: page for page in published}, "keys and pages disagree"
        for page in published:
            parent = self._parents[page]
            assert not parent or self._publications[parent], f"page {page} is published, and not its parent {parent}"
            assert not parent or self._pool.holders(page) <= self._pool.holders(parent), f"{page} without {parent}"
        pending = [page for _, _, pages in self._pending for page in pages]
        assert all(self._publications[page] and self._pool.holders(page) for page in pending), "lost while pending"
        idle = self._pool.idle
        assert {page for page in published if not self._pool.holders(page)} <= set(idle), "free, published and not kept"
        self._check_idle(idle)

    def _check_idle(self, idle: Iterable[int]) -> None:
        gone: set[int] = set()
        for page in idle:
            assert self._publications[page], f"page {page} is kept, and not published"
            assert self._parents[page] not in gone, f"page {page} goes after its parent"
            gone.add(page)

    def _match(self, sequence: Sequence, index: int, parent: int) -> int | None:
        page = self._page_of.get(sequence.page_keys[index])
        if page is None or self._parents[page] != parent:
            return None
        return page if self._contents[page] == sequence.page_contents[index] else None

    def _forget(self, pages: Iterable[int]) -> None:
        """Unpublish those that are published. What else is known of a page means nothing then."""
        page_of, keys, publications = self._page_of, self._keys, self._publications
        for page in pages:
            if publications[page]:
                publications[page] = 0
                del page_of[keys[page]]
