"""The Block Transformer as the engine runs it (Ho et al., 2024, arXiv 2406.02657).

Letters in shapes: R rows, N positions, L block length, H block decoder width, h token decoder width, V vocabulary, D
head size.
"""

from collections.abc import Mapping

from torch import Tensor

from engine.config import ModelConfig
from engine.model.block_decoder import BlockDecoder, DecodeBatch, PrefillBatch
from engine.model.embedder import Embedder
from engine.model.token_decoder import Choose, Scratch, TokenDecoder
from kernels.dispatch import Kernels

__all__ = ["BlockTransformer", "Choose", "DecodeBatch", "PrefillBatch", "Scratch"]


class BlockTransformer:
    """Embedder, block decoder and token decoder over given weights.

    Holds weights only; caches and batches are arguments. `decode` and `write_block` never wait for the device.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], kernels: Kernels) -> None:
        """`tensors`: the weights of `engine.weights.expected_shapes(config)`, all of one dtype and on one device."""
        self.config = config
        self._embedder = Embedder(config, tensors, kernels)
        self._block_decoder = BlockDecoder(config, tensors, kernels)
        self._token_decoder = TokenDecoder(config, tensors, kernels)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Block embeddings: token_ids [N, L] int -> [N, H]."""
        return self._embedder.embed(token_ids)

    def prefill(self, token_ids: Tensor, batch: PrefillBatch, keys: Tensor, values: Tensor) -> None:
        """Store keys and values of prompt blocks token_ids [N, L] in the paged cache; there is no output.

        keys, values: [layers, pages, heads, page_size, D].
        """
        self._block_decoder.prefill(self.embed(token_ids), batch, keys, values)

    def decode(self, token_ids: Tensor, batch: DecodeBatch, keys: Tensor, values: Tensor) -> Tensor:
        """One more block for each row: token_ids [R, L] -> context embeddings [R, H], which condition the next block.

        keys, values: [layers, pages, heads, page_size, D].
        """
        return self._block_decoder.decode(self.embed(token_ids), batch, keys, values)

    def new_scratch(self, rows: int) -> Scratch:
        """The cache that `write_block` needs for `rows` rows."""
        return self._token_decoder.new_scratch(rows)

    def write_block(self, context: Tensor, scratch: Scratch, choose: Choose) -> Tensor:
        """Write a block for each row of `context` [R, H]: tokens [R, L].

        `choose(logits [R, V], place)` samples or forces the token at each place of the block; it is fed back to the
        model.
        """
        return self._token_decoder.write_block(context, scratch, choose)
