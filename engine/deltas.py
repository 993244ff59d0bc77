"""What a step's commit gave to the requests: most of them a whole block, which is kept in one piece."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.sequence import Sequence
from engine.types import Delta


@dataclass(frozen=True)
class StepDeltas:
    """Iterates over (sequence, delta); who serves thousands of rows reads the parts instead."""

    sequences: list[Sequence]
    """Those that go on, had tokens before, and gained a whole block."""
    blocks: NDArray[np.int32]
    """Their tokens [N, L]."""
    others: list[tuple[Sequence, Delta]] = field(default_factory=list)
    """All that began, ended or failed."""

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.blocks.size + sum(len(delta.token_ids) for _, delta in self.others)

    def __len__(self) -> int:
        return len(self.sequences) + len(self.others)

    def __iter__(self) -> Iterator[tuple[Sequence, Delta]]:
        yield from self.others
        for sequence, tokens in zip(self.sequences, self.blocks.tolist(), strict=True):
            yield sequence, Delta(request_id=sequence.request.request_id, token_ids=tuple(tokens))
