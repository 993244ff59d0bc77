"""Sequences that wait for a row, smallest (priority, order of arrival) first."""

import heapq

from engine.sequence import Sequence

_COMPACT_ABOVE = 64


class WaitingQueue:
    """A heap from which any sequence can be taken back.

    Those taken back stay in the heap until they come up or outnumber the others, so that taking one back never costs a
    search, and a queue whose head has to wait for long does not grow with what comes and goes behind it.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._live: set[Sequence] = set()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._live)

    def push(self, sequence: Sequence) -> None:
        """Put a new sequence behind all of its priority; this gives it its rank."""
        sequence.rank = (sequence.request.priority, self._arrivals)
        self._arrivals += 1
        self.push_back(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """Put a sequence that has had its turn back where its rank belongs: ahead of all that came after it."""
        heapq.heappush(self._heap, (*sequence.rank, sequence))
        self._live.add(sequence)

    def peek(self) -> Sequence | None:
        """The sequence whose turn it is."""
        while self._heap and self._heap[0][2] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take the sequence whose turn it is. Raises IndexError when none waits."""
        sequence = self.peek()
        if sequence is None:
            raise IndexError("no sequence waits")
        heapq.heappop(self._heap)
        self._live.remove(sequence)
        self._compact_if_sparse()
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take back a sequence wherever it stands. Raises KeyError where it does not wait."""
        self._live.remove(sequence)
        self._compact_if_sparse()

    def check_integrity(self) -> None:
        """Raises AssertionError where heap and members differ, or the heap has kept too much."""
        entries = [entry[2] for entry in self._heap]
        assert len(set(entries)) == len(entries), "a sequence is queued twice"
        assert self._live <= set(entries), "a waiting sequence is not in the heap"
        assert len(entries) <= max(_COMPACT_ABOVE, 2 * len(self._live)), "the heap keeps sequences that are gone"

    def _compact_if_sparse(self) -> None:
        if len(self._heap) > max(_COMPACT_ABOVE, 2 * len(self._live)):
            self._heap = [entry for entry in self._heap if entry[2] in self._live]
            heapq.heapify(self._heap)
