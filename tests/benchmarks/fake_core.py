"""An engine core on a clock of its own, which only a step's time and sleep move on."""

from collections import deque
from collections.abc import Hashable
from collections.abc import Sequence as Seq

import numpy as np

from benchmarks.drive import Clock
from benchmarks.traffic import wanted_tokens
from engine.alignment import AlignedPrompt
from engine.core import StepReport
from engine.deltas import StepDeltas
from engine.sequence import Sequence
from engine.types import Delta, GenerationRequest, Timing

BLOCK = 4


class FakeCore:
    """Blocks of four tokens; a step takes `fixed` seconds, and more for each row and each prompt position in it."""

    def __init__(
        self,
        *,
        max_rows: int,
        fixed: float,
        per_row: float,
        per_position: float = 0.0,
        prompts: float = 0.0,
        positions: int = 4096,
    ) -> None:
        """`prompts`: seconds that any prompt in a step costs. `positions` of prompts fit into a step."""
        self._max_rows = max_rows
        self._fixed, self._per_row, self._per_position, self._prompts = fixed, per_row, per_position, prompts
        self._positions = positions
        self._now = 0.0
        self._waiting: deque[GenerationRequest] = deque()
        self._rows: dict[Hashable, tuple[Sequence, int, bool]] = {}
        self.submitted: list[tuple[float, GenerationRequest]] = []

    @property
    def clock(self) -> Clock:
        """Its time."""
        return Clock(lambda: self._now, self._sleep)

    @property
    def has_work(self) -> bool:
        """As a core's."""
        return bool(self._waiting or self._rows)

    def add(self, group: Seq[tuple[Hashable, GenerationRequest]]) -> None:
        """As a core's."""
        self._waiting.extend(request for _, request in group)
        self.submitted += [(self._now, request) for _, request in group]

    def abort(self, key: Hashable) -> bool:
        """As a core's."""
        self._waiting = deque(request for request in self._waiting if request.request_id != key)
        self._rows.pop(key, None)
        return True

    def shorten(self, key: Hashable) -> None:
        """Let an answer end with the block that it is at."""
        self._admit()
        sequence, _, begun = self._rows[key]
        self._rows[key] = (sequence, 1, begun)

    def step(self) -> StepReport:
        """A block for each row, and then as many prompts as fit."""
        going, others = [], []
        rows = len(self._rows)
        for key, (sequence, remaining, begun) in list(self._rows.items()):
            if remaining <= BLOCK:
                del self._rows[key]
            else:
                self._rows[key] = (sequence, remaining - BLOCK, True)
            if begun and remaining > BLOCK:
                going.append(sequence)
            else:
                delta = Delta(
                    request_id=sequence.request.request_id,
                    token_ids=(1,) * min(BLOCK, remaining),
                    finish_reason="stop" if remaining <= BLOCK else None,
                    timing=None if begun else Timing(0.0, 0.0),
                )
                others.append((sequence, delta))
        positions = self._admit()
        seconds = self._fixed + self._per_row * rows + self._per_position * positions + self._prompts * bool(positions)
        self._now += seconds
        return StepReport(StepDeltas(going, np.ones((len(going), BLOCK), np.int32), others), rows, seconds, [])

    def _admit(self) -> int:
        positions = 0
        while self._waiting and len(self._rows) < self._max_rows and positions < self._positions:
            request = self._waiting.popleft()
            positions += len(request.prompt) // (4 * BLOCK)
            prompt = AlignedPrompt(blocks=np.zeros((1, BLOCK), np.int32), padding=0, forced=())
            sequence = Sequence(
                key=request.request_id, request=request, prompt=prompt, arrival=self._now, block_length=BLOCK
            )
            self._rows[request.request_id] = (sequence, wanted_tokens([request]), False)
        return positions

    def _sleep(self, seconds: float) -> None:
        self._now += seconds
