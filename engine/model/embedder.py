"""The lookup embedder: one vector of the block decoder's width for each block (paper section 2.1)."""

from collections.abc import Mapping

from torch import Tensor

from engine.config import BlockTransformerConfig
from engine.model.layers import Linear
from kernels.dispatch import Kernels


class Embedder:
    """Token vectors side by side; with a projection layer, a convolution over them that is as long as the block."""

    def __init__(self, table: Tensor, kernels: Kernels, projection: Linear | None = None) -> None:
        """table: [V, E]. `projection` takes a block's vectors side by side: weight [L * E, H]."""
        self._table = table
        self._kernels = kernels
        self._projection = projection

    @classmethod
    def of(cls, config: BlockTransformerConfig, tensors: Mapping[str, Tensor], kernels: Kernels) -> "Embedder":
        """The embedder of a Block Transformer's checkpoint."""
        projection: Linear | None = None
        if config.embedder.projection == "projection_layer":
            weight = tensors["embedder.projection_layer.weight"]  # [H, E, L]
            by_token = weight.permute(2, 1, 0).flatten(0, 1).contiguous()  # [L * E, H]
            projection = Linear(by_token, tensors["embedder.projection_layer.bias"])
        return cls(tensors["embedder.embeddings.weight"], kernels, projection)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [N, L] -> [N, H]. Masks play no part: a pad contributes the vector of its id."""
        vectors = self._kernels.block_embedding(token_ids, self._table)
        if self._projection is None:
            return vectors
        return self._kernels.linear(vectors, self._projection.weight, self._projection.bias)
