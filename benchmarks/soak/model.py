"""What a soak serves, and how its answers are judged."""

from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from torch import Tensor

from benchmarks.models import block_transformer
from engine.config import ModelConfig
from engine.kv_cache import KVLayout
from engine.model_files import embedded_model_directory
from engine.weights import load_weights, random_weights

RANDOM_SEED = 0
PAGE_SIZE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SoakModel:
    """A model, the type it computes with, and how close two scores lie that rounding may swap."""

    name: str
    config: ModelConfig
    dtype: str
    tie: float
    """Difference of perturbed scores, see `benchmarks.soak.oracle`."""
    truncates: bool
    """Whether requests use top-p and top-k. What is at a threshold is decided by rounding, too, and has no margin: a
    matter of one token in millions in float32, of one in a hundred in bfloat16 with the flat scores of random weights.
    """
    weights: Path | None
    """None: random ones."""

    def write(self, directory: Path) -> None:
        """Make a model directory to serve: the config, a tokenizer of numbers, and the weights as links."""
        (directory / "config.json").write_text(self.config.model_dump_json(), encoding="utf-8")
        (directory / "tokenizer.json").write_text(number_tokenizer(self.config.vocab_size), encoding="utf-8")
        for path in self.weights.glob("*.safetensors*") if self.weights is not None else ():
            (directory / path.name).symlink_to(path)

    @property
    def pages_of_longest(self) -> int:
        """Pages that a request of the model's maximum length takes."""
        return -(-self.config.max_positions // PAGE_SIZE)

    def serve_arguments(self, directory: Path, rows: int, pages: int) -> list[str]:
        """Flags of `blockserve serve`."""
        layout = KVLayout.of(self.config.block_decoder, PAGE_SIZE, getattr(torch, self.dtype))
        arguments = ["--model", str(directory), "--dtype", self.dtype, "--max-rows", str(rows)]
        arguments += ["--page-size", str(PAGE_SIZE), "--kv-bytes", str((pages + 1) * layout.page_bytes)]
        return arguments + (["--random-weights", str(RANDOM_SEED)] if self.weights is None else [])

    def tensors(self) -> dict[str, Tensor]:
        """The weights as served, on the CPU."""
        dtype = getattr(torch, self.dtype)
        if self.weights is None:
            return random_weights(self.config, dtype, CPU, RANDOM_SEED)
        return load_weights(self.weights, self.config, dtype, CPU)


def number_tokenizer(vocab_size: int) -> str:
    """A tokenizer.json whose token i reads " i", so that a text says exactly which tokens were written."""
    vocabulary = {f"Ġ{token}": token for token in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary))
    tokenizer.decoder = ByteLevel()
    return str(tokenizer.to_str())


def soak_model(name: str) -> SoakModel:
    """The model called `name`. Raises KeyError for another than MODEL_NAMES."""
    if name == "default":
        directory = embedded_model_directory()
        return SoakModel(name, ModelConfig.load(directory), "float32", tie=1e-4, truncates=True, weights=directory)
    config = {"block-302M": block_transformer(layers=12, hidden_size=1024, head_size=64, max_length=2048)}[name]
    return SoakModel(name, config, "bfloat16", tie=0.03, truncates=False, weights=None)


MODEL_NAMES = ("default", "block-302M")
