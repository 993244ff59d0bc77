"""From a config to the model of its kind."""

from collections.abc import Mapping

from torch import Tensor

from engine.config import BlockTransformerConfig, ModelConfig, VanillaConfig
from engine.model.block_transformer import BlockTransformer
from engine.model.model import Model
from engine.model.vanilla import VanillaTransformer
from kernels.dispatch import Kernels


def build_model(config: ModelConfig, tensors: Mapping[str, Tensor], kernels: Kernels) -> Model:
    """The model over the weights of `engine.weights.expected_shapes(config)`, all of one dtype and on one device."""
    if isinstance(config, BlockTransformerConfig):
        return BlockTransformer(config, tensors, kernels)
    assert isinstance(config, VanillaConfig)
    return VanillaTransformer(config, tensors, kernels)
