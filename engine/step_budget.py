"""What a step may cost: positions, and the attention of prompt positions to what stands before them."""

import math

ATTENTION_COST = 2.0
"""Time of an operation of prefill attention, in times of one of a matrix product: 300 and 600 TFLOP/s on an H100
(benchmarks/results/kernels.jsonl)."""


class StepBudget:
    """Costs are in positions of a short context.

    A position's products take 2 (4 H^2 + 2 H F) operations a layer, its attention 4 H for each position before it (H
    the width, F the inner one): at a context of `attention_positions` both take the same time.
    """

    def __init__(self, positions: int, attention_positions: float = math.inf) -> None:
        """`positions`: what a step may cost."""
        self.positions = positions
        self._attention_positions = attention_positions

    @classmethod
    def of(cls, positions: int, hidden_size: int, intermediate_size: int) -> "StepBudget":
        """The budget of a decoder of these widths."""
        return cls(positions, (2 * hidden_size + intermediate_size) / ATTENTION_COST)

    def cost(self, start: int, length: int) -> int:
        """Of a prompt chunk of `length` positions from `start` on, rounded up."""
        return length + math.ceil(length * (start + length / 2) / self._attention_positions)

    def affordable(self, start: int, budget: int) -> int:
        """Positions of the longest chunk from `start` on that costs no more than `budget`.

        One, where `budget` is positive and even that costs more: a prompt has to go on whatever stands before it.
        """
        # length^2 / 2A + length (1 + start / A) = budget
        linear = 1 + start / self._attention_positions
        root = math.sqrt(linear * linear + 2 * budget / self._attention_positions)
        length = int(2 * budget / (linear + root))
        while length > 0 and self.cost(start, length) > budget:
            length -= 1
        return max(length, 1) if budget > 0 else 0
