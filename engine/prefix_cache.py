"""Which pages hold the KV of which prompt prefixes, so that equal prefixes are computed once and shared.

A page's keys and values depend on every token from the sequence's start to the page's end, and on nothing else that
differs within one process. So its key is sha256(key of the page before || token ids), from a root that is drawn for the
process and a request's salt: what one client's prompts are is not to be found out by another's, and no key can be made
in advance. Padding is among the tokens. A hit compares the tokens too, so even equal keys of different prefixes never
serve one's pages to the other.

A page is published when the step that writes it is planned, so that requests which arrive together share it. Its
readers are in that step or in later ones, and steps run in order. Within a step it is sound too: each layer writes the
keys and values of all chunks before any of them attends, and where chunks run one by one, they run in the order of the
plan, in which the writer is ahead. Until that step is committed the page is pending: if its writer fails, `fail` says
which pages hold nothing, and whoever shares them has to begin again.
"""

import hashlib
import secrets
from bisect import bisect_left
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
        self._keys: list[bytes | None] = [None] * (pool.capacity + 1)
        self._tokens = [b""] * (pool.capacity + 1)
        self._salts = [""] * (pool.capacity + 1)
        self._parents = [0] * (pool.capacity + 1)
        self._publications = [0] * (pool.capacity + 1)
        """The number of the page's present publication, which no other has; 0 where it is not published."""
        self._published = 0
        self._pending: dict[int, tuple[int, Sequence]] = {}
        """Pages whose step is not committed, in the order of publication: the step's number and the writer."""
        self._asked: Sequence | None = None
        self._found: list[tuple[int, int]] = []
        """What was found for the sequence that asked last: pages and their publications."""
        self.queried_tokens = 0
        """Prompt tokens of all requests that were admitted."""
        self.hit_tokens = 0
        """Those of them that were found."""

    def allocate(self, count: int) -> list[int]:
        """Take free pages, of which nothing is found any more. Raises OutOfPagesError."""
        pages = self._pool.allocate(count)
        for page in pages:
            if self._publications[page]:
                self._forget(page)
        return pages

    def enroll(self, sequence: Sequence) -> None:
        """Give a sequence the keys of its prompt's whole pages that it has none of: a digest a page."""
        if not self._enabled:
            return
        keys = sequence.page_keys
        if not keys:
            key = self._digest(self._secret + sequence.request.cache_salt.encode("utf-8", "surrogatepass"))
        else:
            key = keys[-1]
        # The last prompt block is decoded by its row, and so is not in a page that others can share.
        for index in range(len(keys), sequence.prefill_end // self._page_size):
            key = self._digest(key + self._tokens_of(sequence, index))
            keys.append(key)

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
        for page in pages:
            self._pool.share(page)
        self._asked, self._found = None, []
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
        for index in range(start // self._page_size, min(end // self._page_size, len(sequence.page_keys))):
            page, key = sequence.pages[index], sequence.page_keys[index]
            if self._publications[page]:
                continue
            parent = sequence.pages[index - 1] if index else 0
            if key in self._page_of or (parent and not self._publications[parent]):
                return
            self._published += 1
            self._publications[page] = self._published
            self._page_of[key] = page
            self._keys[page] = key
            self._tokens[page] = self._tokens_of(sequence, index)
            self._salts[page] = sequence.request.cache_salt
            self._parents[page] = parent
            self._pool.keep(page)
            if step is not None:
                self._pending[page] = (step, sequence)

    def confirm(self, step: int) -> None:
        """The step is committed, and so is what it wrote."""
        for page in [page for page, (number, _) in self._pending.items() if number <= step]:
            del self._pending[page]

    def fail(self, writers: Collection[Sequence]) -> set[int]:
        """Unpublish what these did not write, and what was written from it. Returns those pages: all have holders."""
        spoiled: set[int] = set()
        for page, (_, writer) in self._pending.items():
            if writer in writers or self._parents[page] in spoiled:
                spoiled.add(page)
        for page in spoiled:
            del self._pending[page]
            self._forget(page)
            self._pool.drop(page)
        return spoiled

    def check_integrity(self) -> None:
        """Raises AssertionError where chains are broken or disagree with the pool. Costs O(pages)."""
        published = [page for page, number in enumerate(self._publications) if number]
        assert self._page_of == {self._keys[page]: page for page in published}, "keys and pages disagree"
        for page in published:
            parent = self._parents[page]
            assert not parent or self._publications[parent], f"page {page} is published, and not its parent {parent}"
            assert not parent or self._pool.holders(page) <= self._pool.holders(parent), f"{page} without {parent}"
        assert all(self._publications[page] and self._pool.holders(page) for page in self._pending), (
            "lost while pending"
        )
        self._check_idle(self._pool.idle)

    def _check_idle(self, idle: Iterable[int]) -> None:
        gone: set[int] = set()
        for page in idle:
            assert self._publications[page], f"page {page} is kept, and not published"
            assert self._parents[page] not in gone, f"page {page} goes after its parent"
            gone.add(page)

    def _match(self, sequence: Sequence, index: int, parent: int) -> int | None:
        page = self._page_of.get(sequence.page_keys[index])
        if page is None or self._parents[page] != parent or self._salts[page] != sequence.request.cache_salt:
            return None
        return page if self._tokens[page] == self._tokens_of(sequence, index) else None

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._page_of[key]
        self._keys[page], self._tokens[page], self._salts[page] = None, b"", ""
        self._parents[page] = self._publications[page] = 0

    def _tokens_of(self, sequence: Sequence, index: int) -> bytes:
        return sequence.blocks[index * self._page_size : (index + 1) * self._page_size].tobytes()
