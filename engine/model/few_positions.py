"""The layers of a decoder for few positions: three launches a layer.

The products of so few positions do little but read weights, and every launch between them costs as much as a small
product. So there is no norm of its own (`kernels.late_norm`), and the second product adds to the residual stream in
place:

    p  = x @ Winto
    x' = x + between(p, and what normalises it) @ Wout_of

That leaves the biases of Wout_of. They are constants, so that the stream can go without them: layer l knows what it is
short of there, c_l, the sum of the biases of the layers before it that ran this way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.layers import LayerStack, Linear
from kernels.late_norm import LateNorm

LateBetween = Callable[[int, Tensor, Tensor, LateNorm | None], None]
"""As `Between`, of a first product that is not yet normalised: (layer, p [N, 3 * H + F], out [N, H + F], norm).

Without a norm it is `Between` itself.
"""


@dataclass(frozen=True)
class _Constants:
    """Of layers from a certain one on."""

    missing: list[tuple[Tensor, Tensor]]
    """c_l and c_l @ Winto of each."""
    last: Linear
    """The last product, which adds all that is missing by then."""


class FewPositions:
    """What `LayerStack.forward` computes, over the stack's own weights."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        # Entries of a table bring along what the first layer adds, its bias too.
        self._constants = self._constants_from(0), self._constants_from(1)

    def suit(self, x: Tensor) -> bool:
        """Whether an x as `LayerStack.forward` has it is better run this way.

        Not in float16, whose range the product of a stream that is not normalised may leave.
        """
        few = len(x) <= self._stack.kernels.late_norm_positions and x.dtype != torch.float16
        # Of one layer, there is nothing left behind a table.
        return few and (len(self._stack.layers) > 1 or x.shape[1] == self._stack.config.hidden_size)

    def forward(self, x: Tensor, between: LateBetween) -> Tensor:
        """All layers and the final norm: x as `LayerStack.forward` has it, contiguous and overwritten, -> [N, H]."""
        stack, eps = self._stack, self._stack.config.layer_norm_eps
        x, branch, first = stack.begin(x, lambda layer, into, inner: between(layer, into, inner, None))
        if branch is not None:
            x = branch.add_(x)
        constants, inner = self._constants[first], x
        for index, (missing, missing_product) in enumerate(constants.missing, first):
            layer = stack.layers[index]
            if index > first:
                stack.kernels.add_linear(x, inner, stack.layers[index - 1].out_of.weight)
            assert layer.into.bias is not None
            product = stack.kernels.linear(x, layer.into.weight, None)
            inner = x.new_empty(len(x), layer.out_of.weight.shape[0])
            between(index, product, inner, LateNorm(x, missing, missing_product, layer.into.bias, eps))
        norm = stack.final_norm
        return stack.kernels.residual_layer_norm(x, stack.linear(inner, constants.last), norm.weight, norm.bias, eps)

    def _constants_from(self, first: int) -> _Constants:
        missing = torch.zeros_like(self._stack.final_norm.bias, dtype=torch.float32)
        each = []
        for layer in self._stack.layers[first:]:
            assert layer.out_of.bias is not None
            each.append((missing, missing @ layer.into.weight.float()))
            missing = missing + layer.out_of.bias
        last = self._stack.layers[-1].out_of.weight
        return _Constants(each, Linear(last, missing.to(last.dtype)))
