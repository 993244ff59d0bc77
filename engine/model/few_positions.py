"""The layers of a decoder for few positions: three launches a layer.

The products of so few positions do little but read weights, and every launch between them costs as much as a small
product. So there is no norm of its own (`kernels.late_norm`), and the second product adds to the residual stream in
place:

    p  = x @ Winto
    x' = x + between(p, and what normalises it) @ Wout_of

That leaves the biases of Wout_of. They are constants, so that the stream can go without them: layer l knows what it is
short of there, c_l, the sum of the biases of layers 0 to l - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.model.layers import LayerStack, Linear
from kernels.late_norm import LateNorm

LateBetween = Callable[[int, Tensor, Tensor, LateNorm], None]
"""As `Between`, of a first product that is not yet normalised: (layer, p [N, 3 * H + F], out [N, H + F], norm)."""


class FewPositions:
    """What `LayerStack.forward` computes, over the stack's own weights."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        missing = torch.zeros_like(stack.final_norm.bias, dtype=torch.float32)
        self._missing: list[tuple[Tensor, Tensor]] = []
        """c_l and c_l @ Winto for each layer."""
        for layer in stack.layers:
            assert layer.out_of.bias is not None
            self._missing.append((missing, missing @ layer.into.weight.float()))
            missing = missing + layer.out_of.bias
        last = stack.layers[-1].out_of.weight
        self._last = Linear(last, missing.to(last.dtype))
        """The last product, which adds all that is missing by then."""

    def suit(self, x: Tensor) -> bool:
        """Whether x [N, H] is better run this way.

        Not in float16, whose range the product of a stream that is not normalised may leave.
        """
        return len(x) <= self._stack.kernels.late_norm_positions and x.dtype != torch.float16

    def forward(self, x: Tensor, between: LateBetween) -> Tensor:
        """All layers and the final norm: x [N, H], contiguous and overwritten, -> [N, H]."""
        stack, eps = self._stack, self._stack.config.layer_norm_eps
        inner = x
        for index, (layer, (missing, missing_product)) in enumerate(zip(stack.layers, self._missing, strict=True)):
            if index:
                stack.kernels.add_linear(x, inner, stack.layers[index - 1].out_of.weight)
            assert layer.into.bias is not None
            product = stack.kernels.linear(x, layer.into.weight, None)
            inner = x.new_empty(len(x), layer.out_of.weight.shape[0])
            between(index, product, inner, LateNorm(x, missing, missing_product, layer.into.bias, eps))
        norm = stack.final_norm
        return stack.kernels.residual_layer_norm(x, stack.linear(inner, self._last), norm.weight, norm.bias, eps)
