"""A vanilla GPT-NeoX transformer (Pythia) as the engine runs it: positions are tokens, and the writer is the head.

Letters in shapes: R rows, H width, V vocabulary.
"""

from collections.abc import Mapping

from torch import Tensor

from engine.config import VanillaConfig
from engine.model.block_decoder import BlockDecoder
from engine.model.embedder import Embedder
from engine.model.layers import Linear
from engine.model.model import Model
from engine.model.token_table import first_layer_table
from engine.model.writer import Choose, Scratch
from kernels.dispatch import Kernels


class VanillaTransformer(Model):
    """A table of token vectors, all layers with the final norm, and the head: logits = hidden @ embed_out.T.

    The vectors are the tokens' entries of a `token_table`, which hold most of the first layer.
    """

    def __init__(self, config: VanillaConfig, tensors: Mapping[str, Tensor], kernels: Kernels) -> None:
        """`tensors`: the weights of `engine.weights.expected_shapes(config)`, all of one dtype and on one device."""
        super().__init__(
            config,
            Embedder(first_layer_table(tensors, "gpt_neox", config.block_decoder.layer_norm_eps), kernels),
            BlockDecoder(config, tensors, "gpt_neox", kernels),
            Head(tensors, kernels),
        )


class Head:
    """Writes the one token of a position from the layers' output."""

    def __init__(self, tensors: Mapping[str, Tensor], kernels: Kernels) -> None:
        self._kernels = kernels
        self._linear = Linear.of(tensors, "embed_out")

    def new_scratch(self, rows: int) -> Scratch:
        """Of no layers: nothing is kept."""
        weight = self._linear.weight
        return Scratch(weight.new_zeros(0, rows, 0, 0, 0), weight.new_zeros(0, rows, 0, 0, 0))

    def write_block(self, context: Tensor, _scratch: Scratch, choose: Choose) -> Tensor:
        """Choose a token for each row of `context` [R, H], which is behind the final norm. Returns tokens [R, 1]."""
        logits = self._kernels.linear(context, self._linear.weight, self._linear.bias)
        return choose(logits, 0)[:, None]
