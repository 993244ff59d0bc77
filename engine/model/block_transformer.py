"""The Block Transformer as the engine runs it (Ho et al., 2024, arXiv 2406.02657)."""

from collections.abc import Mapping

from torch import Tensor

from engine.config import BlockTransformerConfig
from engine.model.block_decoder import BlockDecoder
from engine.model.embedder import Embedder
from engine.model.model import Model
from engine.model.token_decoder import TokenDecoder
from kernels.dispatch import Kernels


class BlockTransformer(Model):
    """A lookup embedder, the block decoder, and a token decoder that writes blocks."""

    def __init__(self, config: BlockTransformerConfig, tensors: Mapping[str, Tensor], kernels: Kernels) -> None:
        """`tensors`: the weights of `engine.weights.expected_shapes(config)`, all of one dtype and on one device."""
        super().__init__(
            config,
            Embedder.of(config, tensors, kernels),
            BlockDecoder(config, tensors, "block_decoder.gpt_neox", kernels),
            TokenDecoder(config, tensors, kernels),
        )
