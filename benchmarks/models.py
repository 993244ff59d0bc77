"""What is measured: the shapes of the paper's Block Transformers and of the vanilla transformers that they are compared
with, three workloads, and the floor of each model and workload.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import (
    BlockTransformerConfig,
    DecoderConfig,
    EmbedderConfig,
    ModelConfig,
    TokenDecoderConfig,
    VanillaConfig,
)

VOCAB_SIZE = 50304
BLOCK_LENGTH = 4
PREFIX_LENGTH = 2


@dataclass(frozen=True)
class Workload:
    """Prompts and answers of one length each, in tokens."""

    name: str
    prompt_tokens: int
    answer_tokens: int


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("P", prompt_tokens=2048, answer_tokens=128),
        Workload("D", prompt_tokens=128, answer_tokens=2048),
        Workload("X", prompt_tokens=8192, answer_tokens=1024),
    )
}
"""The paper's prefill-heavy and decode-heavy ones, and a long one."""

MAX_LENGTH = max(workload.prompt_tokens + workload.answer_tokens for workload in WORKLOADS.values())


@dataclass(frozen=True)
class BenchmarkModel:
    """A shape, the batch it is measured with, and how fast the device could be at that batch."""

    name: str
    config: ModelConfig
    rows: int
    floors: Mapping[str, int]
    """Tokens a second by workload on one H200 in bfloat16 with `rows` rows: the time of a step's matrix products in
    one graph and of one reading of its KV at 4.28 TB/s, one after the other. For the vanilla models the products are
    counted at 620 TFLOP/s. Measured with all products of the first layer that tokens enter, for which a table stands
    since: 3 to 5% of a step's."""

    def floor(self, workload: str, *, rows: int, dtype: str, device: str) -> int | None:
        """The floor in tokens a second; None for what it was not measured for."""
        measured = rows == self.rows and dtype == "bfloat16" and device == "NVIDIA H200"
        return self.floors.get(workload) if measured else None


def block_transformer(
    layers: int, hidden_size: int, head_size: int, max_length: int = MAX_LENGTH
) -> BlockTransformerConfig:
    """A Block Transformer whose two decoders have the same shape."""
    decoder = _decoder(layers, hidden_size, head_size)
    return BlockTransformerConfig(
        vocab_size=VOCAB_SIZE,
        block_length=BLOCK_LENGTH,
        max_length=max_length,
        dtype="bfloat16",
        embedder=EmbedderConfig(hidden_size=hidden_size // BLOCK_LENGTH),
        block_decoder=DecoderConfig(**decoder),
        token_decoder=TokenDecoderConfig(**decoder, strategy="prefix", prefix_length=PREFIX_LENGTH),
    )


def vanilla_transformer(layers: int, hidden_size: int, max_length: int = MAX_LENGTH) -> VanillaConfig:
    """A GPT-NeoX transformer, as Pythia's are."""
    return VanillaConfig(
        vocab_size=VOCAB_SIZE,
        max_length=max_length,
        dtype="bfloat16",
        block_decoder=DecoderConfig(**_decoder(layers, hidden_size, head_size=64)),
    )


def _decoder(layers: int, hidden_size: int, head_size: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden_size,
        "num_heads": hidden_size // head_size,
        "intermediate_size": 4 * hidden_size,
    }


MODELS = {
    model.name: model
    for model in (
        BenchmarkModel(
            "block-1.2B",
            block_transformer(layers=12, hidden_size=2048, head_size=128),
            rows=1024,
            floors={"D": 208_000, "P": 74_000, "X": 51_000},
        ),
        BenchmarkModel(
            "block-302M",
            block_transformer(layers=12, hidden_size=1024, head_size=64),
            rows=2048,
            floors={"D": 580_000, "P": 226_000, "X": 120_000},
        ),
        BenchmarkModel(
            "block-85M",
            block_transformer(layers=6, hidden_size=768, head_size=64),
            rows=4096,
            floors={"D": 1_567_000, "P": 648_000, "X": 326_000},
        ),
        BenchmarkModel(
            "vanilla-302M",
            vanilla_transformer(layers=24, hidden_size=1024),
            rows=512,
            floors={"D": 36_200, "P": 14_400, "X": 4_600},
        ),
        BenchmarkModel(
            "vanilla-85M",
            vanilla_transformer(layers=12, hidden_size=768),
            rows=1024,
            floors={"D": 96_900, "P": 40_800, "X": 12_400},
        ),
        BenchmarkModel(
            "vanilla-19M",
            vanilla_transformer(layers=6, hidden_size=512),
            rows=4096,
            floors={"D": 290_000, "P": 130_000, "X": 37_600},
        ),
    )
}
"""Named by the parameters of their layers, the embedding tables not counted."""

CONTROLS = {"block-1.2B": "vanilla-302M", "block-302M": "vanilla-85M", "block-85M": "vanilla-19M"}
"""The vanilla model that each block model is compared with: the largest whose validation loss it does not exceed
(2.188 to 2.224, 2.445 to 2.476 and 2.753 to 2.820 in the paper)."""
