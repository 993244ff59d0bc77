"""Products of activations and a weight matrix."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias.

    x: [N, in]. weight: [in, out] (the transpose of how checkpoints store it). bias: [out] or None. Returns [N, out].
    """
    if x.shape[0] == 1 and x.device.type == "cpu":
        # The CPU's libraries multiply a single row by other code than several, which sums in another order. From two
        # rows on, and with weights stored this way, a row's result does not depend on how many rows are beside it.
        return linear(torch.cat((x, x)), weight, bias)[:1]
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total += x @ weight, in place.

    total: [N, out]. x: [N, in]. weight: as for `linear`.
    """
    if x.shape[0] == 1 and x.device.type == "cpu":
        total += linear(x, weight, None)
    else:
        total.addmm_(x, weight)
