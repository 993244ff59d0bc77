"""What the engine runs: an embedder, the block decoder over positions, and a writer.

Letters in shapes: R rows, N positions, L block length, H block decoder width, V vocabulary, D head size.
"""

from torch import Tensor

from engine.config import ModelConfig
from engine.model.block_decoder import BlockDecoder, DecodeBatch, PrefillBatch
from engine.model.embedder import Embedder
from engine.model.writer import Choose, Scratch, Writer


class Model:
    """The parts of a model put together; its kinds differ in what the parts are.

    Holds weights only; caches and batches are arguments. `decode` and `write_block` never wait for the device.
    """

    def __init__(self, config: ModelConfig, embedder: Embedder, block_decoder: BlockDecoder, writer: Writer) -> None:
        self.config = config
        self._embedder = embedder
        self._block_decoder = block_decoder
        self._writer = writer

    def embed(self, token_ids: Tensor) -> Tensor:
        """Block embeddings: token_ids [N, L] int -> [N, H]."""
        return self._embedder.embed(token_ids)

    def prefill(self, token_ids: Tensor, batch: PrefillBatch, keys: Tensor, values: Tensor) -> None:
        """Store keys and values of prompt blocks token_ids [N, L] in the paged cache; there is no output.

        keys, values: [layers, pages, heads, page_size, D].
        """
        self._block_decoder.prefill(self.embed(token_ids), batch, keys, values)

    def contexts(self, token_ids: Tensor, batch: PrefillBatch, keys: Tensor, values: Tensor) -> Tensor:
        """As `prefill`, with an output: context embeddings [N, H], each of which conditions the block behind it."""
        return self._block_decoder.contexts(self.embed(token_ids), batch, keys, values)

    def decode(self, token_ids: Tensor, batch: DecodeBatch, keys: Tensor, values: Tensor) -> Tensor:
        """One more block for each row: token_ids [R, L] -> context embeddings [R, H], which condition the next block.

        keys, values: [layers, pages, heads, page_size, D].
        """
        return self._block_decoder.decode(self.embed(token_ids), batch, keys, values)

    def new_scratch(self, rows: int) -> Scratch:
        """The cache that `write_block` needs for `rows` rows."""
        return self._writer.new_scratch(rows)

    def write_block(self, context: Tensor, scratch: Scratch, choose: Choose) -> Tensor:
        """Write a block for each row of `context` [R, H]: tokens [R, L].

        `choose(logits [R, V], place)` samples or forces the token at each place of the block; it is fed back to the
        model.
        """
        return self._writer.write_block(context, scratch, choose)
