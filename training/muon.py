"""Muon: momentum whose matrix updates are made orthogonal (Jordan et al., 2024).

The updates are scaled to the size of AdamW's (Liu et al., 2025), so that both can follow one schedule.

For a gradient G of an a x b matrix: ``M = momentum * M + G``; ``O = orthogonal(G + momentum * M)``, by Newton-Schulz
iterations; ``W = W - rate * (0.2 * sqrt(max(a, b)) * O + decay * W)``. The factor gives O the size of an AdamW update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(g: Tensor, iterations: int = 5) -> Tensor:
    """Bring the singular values of each matrix of ``g`` ``[n, a, b]`` near 1; computed in bf16."""
    x: Tensor = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon:
    """The optimiser for the layers' matrices; matrices of one shape are updated together."""

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float, momentum: float = 0.95) -> None:
        self._groups: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            self._groups.setdefault(matrix.shape, []).append(matrix)
        self._momenta = {shape: [torch.zeros_like(m) for m in group] for shape, group in self._groups.items()}
        self._weight_decay = weight_decay
        self._momentum = momentum

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate ``rate``, from the gradients that lie at the matrices."""
        for shape, matrices in self._groups.items():
            gradients = [m.grad for m in matrices if m.grad is not None]
            momenta = self._momenta[shape]
            torch._foreach_mul_(momenta, self._momentum)
            torch._foreach_add_(momenta, gradients)
            looked_ahead = torch._foreach_add(gradients, momenta, alpha=self._momentum)
            updates = orthogonal(torch.stack(looked_ahead).flatten(2)).float().view(len(matrices), *shape)
            scale = 0.2 * max(shape[0], shape[1]) ** 0.5
            torch._foreach_mul_(matrices, 1 - rate * self._weight_decay)
            torch._foreach_add_(matrices, list(updates.unbind()), alpha=-rate * scale)
