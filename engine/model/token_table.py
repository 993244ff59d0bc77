"""A first layer that reads embeddings of tokens, as a table by token.

With parallel residual, all of a layer but its attention depends on its own input alone. Where that is the embedding
E[t] of a token t, it is computed for each t at load (`engine.model.layers` has the folded weights):

    n        = (E[t] - mean(E[t])) / sqrt(var(E[t]) + eps)
    [q k v]  = n @ Wqkv + bqkv
    x        = E[t] + gelu(n @ Wup + bup) @ Wdown + bout + bdown
    table[t] = [q k v | x]        q, k and v laid out as the product leaves them

Positions play no part: queries and keys are rotated behind this. What is left of the layer is attention with its
product, x + attention(q k v) @ Wout. The table stands in for E itself: V * 4 * H numbers, 3 * V * H more than E.
Letters in shapes: V vocabulary, H width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.layers import Layer

TOKENS_AT_ONCE = 1024
"""That are computed: for each of them the work takes some 15 * H numbers in fp32."""
CPU_WORK = 5e10
"""Floating-point operations that a CPU may spend on a table, about a second of a core. A large vocabulary would take
minutes there, and no time that counts on a GPU."""


def first_layer_table(tensors: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    """What the stack that `tensors` holds under `name` takes for tokens: the table [V, 4 * H] of its first layer.

    The embeddings [V, H] themselves where the table takes too long to compute.
    """
    embeddings = tensors[f"{name}.embed_in.weight"]
    inner = tensors[f"{name}.layers.0.mlp.dense_h_to_4h.weight"].shape[0]
    work = 2 * embeddings.numel() * (3 * embeddings.shape[1] + 2 * inner)
    if embeddings.device.type == "cpu" and work > CPU_WORK:
        return embeddings
    return token_table(embeddings, Layer.of(tensors, f"{name}.layers.0", torch.float32), eps)


def token_table(embeddings: Tensor, layer: Layer, eps: float) -> Tensor:
    """The table [V, 4 * H] of embeddings [V, H], in their dtype. `layer` is the first one, in fp32.

    Computed in fp32, and each entry rounded once.
    """
    width = embeddings.shape[1]
    table = embeddings.new_empty(len(embeddings), 4 * width)
    into, out_of = layer.into, layer.out_of
    assert into.bias is not None and out_of.bias is not None
    for some, entries in zip(embeddings.split(TOKENS_AT_ONCE), table.split(TOKENS_AT_ONCE), strict=True):
        x = some.float()
        normed = F.layer_norm(x, (width,), eps=eps)
        qkv, up = torch.addmm(into.bias, normed, into.weight).tensor_split((3 * width,), dim=1)
        entries[:, : 3 * width] = qkv
        entries[:, 3 * width :] = x + torch.addmm(out_of.bias, F.gelu(up), out_of.weight[width:])
    return table
