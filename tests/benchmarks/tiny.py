"""Models of a few thousand parameters, for benchmarks through their real code."""

from benchmarks.models import BenchmarkModel
from engine.config import BlockTransformerConfig, DecoderConfig, VanillaConfig

TINY = BlockTransformerConfig.parse(
    {
        "vocab_size": 64,
        "block_length": 4,
        "max_length": 256,
        "embedder": {"hidden_size": 8},
        "block_decoder": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64},
        "token_decoder": {
            "num_layers": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "prefix_length": 2,
        },
    }
)  # fmt: skip
MODEL = BenchmarkModel("tiny", TINY, rows=4, floors={"D": 1})
VANILLA = BenchmarkModel(
    "tiny-vanilla",
    VanillaConfig(
        vocab_size=64,
        max_length=256,
        block_decoder=DecoderConfig(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64),
    ),
    rows=4,
    floors={},
)
