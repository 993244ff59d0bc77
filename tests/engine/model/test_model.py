"""The served models against the naive ones: chunked and ragged prefill, ragged decode, every dtype."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from engine.config import BlockTransformerConfig, DecoderConfig, ModelConfig, VanillaConfig
from engine.model.build import build_model
from engine.model.naive import naive_model
from engine.weights import expected_shapes
from kernels.dispatch import torch_kernels
from tests.engine.model.paged import PagedRun

VOCAB = 97
CHUNKS = (
    [(0, 0, 1), (2, 0, 9), (3, 0, 4)],
    [(3, 4, 16), (0, 1, 2), (1, 0, 1)],
    [(2, 9, 2), (3, 20, 1), (0, 3, 8)],
)
"""Passes of prefill: (row, first position, blocks). Row 4 is not prefilled at all."""


def model_config(strategy: str, length: int, prefix: int, projection: str = "concat", eos: int = 0) -> ModelConfig:
    """A model whose two decoders differ in every size."""
    block = {"num_layers": 3, "hidden_size": 96, "num_heads": 3, "intermediate_size": 112, "rotary_pct": 0.25}
    token = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 72, "rotary_pct": 0.5}
    writer = {"strategy": strategy} | ({"prefix_length": prefix} if strategy == "prefix" else {})
    return ModelConfig.parse(
        {
            "vocab_size": VOCAB,
            "block_length": length,
            "max_length": 40 * length,
            "eos_token_id": eos,
            "embedder": {"hidden_size": 96 // length if projection == "concat" else 24, "projection": projection},
            "block_decoder": block,
            "token_decoder": token | writer,
        }
    )


VANILLA = VanillaConfig(
    vocab_size=VOCAB,
    max_length=40,
    block_decoder=DecoderConfig(num_layers=3, hidden_size=96, num_heads=3, intermediate_size=112, rotary_pct=0.5),
)
ONE_LAYER = VANILLA.model_copy(update={"block_decoder": VANILLA.block_decoder.model_copy(update={"num_layers": 1})})
"""Of which the table by token holds keys and values whole."""
CONFIGS = (
    model_config("prefix", length=4, prefix=2),
    model_config("prefix", length=3, prefix=5, projection="projection_layer"),
    model_config("prefix", length=8, prefix=1),
    model_config("prefix", length=1, prefix=1),
    model_config("summation", length=4, prefix=0, eos=5),
    model_config("summation", length=1, prefix=0),
    VANILLA,
    ONE_LAYER,
)


def name_of(config: ModelConfig) -> str:
    if not isinstance(config, BlockTransformerConfig):
        return f"vanilla-{config.block_decoder.num_layers}"
    strategy = f"{config.token_decoder.strategy}{config.expanded_vectors}"
    return f"{strategy}-{config.embedder.projection}-{config.block_length}"


def lively_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Random weights of which none is neutral, so that leaving any out shows."""
    generator = torch.Generator().manual_seed(len(expected_shapes(config)))
    tensors = {}
    for name, shape in expected_shapes(config).items():
        is_norm = name.endswith("norm.weight")
        std = 0.1 if is_norm or name.endswith(".bias") else 0.5 if "embed" in name else 1.5 * shape[1] ** -0.5
        tensors[name] = torch.empty(shape).normal_(float(is_norm), std, generator=generator)
    return tensors


def random_ids(config: ModelConfig, rows: int, blocks: int) -> Tensor:
    generator = torch.Generator().manual_seed(blocks)
    return torch.randint(VOCAB, (rows, blocks, config.block_length), generator=generator, dtype=torch.int32)


def served_results(config: ModelConfig, ids: Tensor, dtype: torch.dtype) -> list[tuple[int, int, Tensor, Tensor]]:
    """Prefill by CHUNKS, then decode some rows at a time: (row, position, context, logits of the next block)."""
    weights = {name: tensor.to(dtype) for name, tensor in lively_weights(config).items()}
    run = PagedRun(build_model(config, weights, torch_kernels()), rows=len(ids), dtype=dtype)
    for chunks in CHUNKS:
        run.prefill([(row, first, ids[row, first : first + count]) for row, first, count in chunks])
    results = []
    for rows in ([0, 1, 2, 3, 4], [4], [1, 3], [4, 3, 2]):
        positions = [run.lengths[row] for row in rows]
        context = run.decode(ids[rows, positions], rows)
        logits = run.forced_logits(context, ids[rows, [position + 1 for position in positions]])
        results += list(zip(rows, positions, context, logits, strict=True))
    return results


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_served_equals_naive(config: ModelConfig) -> None:
    ids = random_ids(config, rows=5, blocks=26)
    naive = naive_model(config, lively_weights(config), torch.float64).forward(ids)
    results = served_results(config, ids, torch.float32)
    assert len(results) == 11
    for row, position, context, logits in results:
        assert_close(context.double(), naive.context_embeddings[row, position], atol=2e-5, rtol=1e-5)
        assert_close(logits.double(), naive.logits[row, position], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CONFIGS[0], VANILLA], ids=name_of)
def test_low_precision_is_as_exact_as_plain_torch(config: ModelConfig, dtype: torch.dtype) -> None:
    ids = random_ids(config, rows=5, blocks=26)
    rounded = {name: tensor.to(dtype) for name, tensor in lively_weights(config).items()}
    exact = naive_model(config, rounded, torch.float64).forward(ids).logits
    plain = naive_model(config, rounded, dtype).forward(ids).logits.double()
    results = served_results(config, ids, dtype)
    ours = torch.stack([logits.double() for *_, logits in results])
    rows, positions = [row for row, *_ in results], [position for _, position, *_ in results]
    allowed = 2 * (plain - exact)[rows, positions].abs().max() + 1e-3
    assert (ours - exact[rows, positions]).abs().max() <= allowed


def test_a_row_does_not_depend_on_the_batch() -> None:
    """From two rows on products do not depend on their number, and a single row is padded to two."""
    config = CONFIGS[0]
    ids = random_ids(config, rows=6, blocks=4)
    model = build_model(config, lively_weights(config), torch_kernels())
    results = []
    for rows in (1, 2, 6):
        run = PagedRun(model, rows=rows)
        for position in range(3):
            context = run.decode(ids[:rows, position])
        results.append(run.forced_logits(context, ids[:rows, 3])[0])
    assert_close(results[0], results[2], atol=1e-5, rtol=1e-5)
    assert_close(results[1], results[2], atol=1e-5, rtol=1e-5)


def test_nothing_of_a_freed_page_is_seen() -> None:
    """A page's unused tail may hold another request's NaN (PagedRun fills it so) or large numbers: no difference."""
    config = CONFIGS[0]
    ids = random_ids(config, rows=2, blocks=12)
    model = build_model(config, lively_weights(config), torch_kernels())
    contexts = []
    for garbage in (torch.nan, torch.inf, 1e30, 0.0):
        run = PagedRun(model, rows=2)
        run.keys.fill_(garbage)
        run.values.fill_(garbage)
        run.prefill([(0, 0, ids[0, :9])])
        contexts.append(run.decode(ids[:, 9]))
        assert contexts[-1].isfinite().all()
    for other in contexts[1:]:
        assert_close(other, contexts[0], atol=1e-6, rtol=1e-6)


def test_a_row_with_nan_fails_alone() -> None:
    config = CONFIGS[0]
    ids = random_ids(config, rows=3, blocks=4)
    model = build_model(config, lively_weights(config), torch_kernels())
    clean, faulty = PagedRun(model, rows=3), PagedRun(model, rows=3)
    for run in (clean, faulty):
        run.prefill([(row, 0, ids[row, :2]) for row in range(3)])
    faulty.values[:, faulty.page_table[int(faulty.table_rows[1]), 0]] = torch.nan
    expected, context = clean.decode(ids[:, 2]), faulty.decode(ids[:, 2])
    assert context[1].isnan().all()
    assert_close(context[[0, 2]], expected[[0, 2]], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", [CONFIGS[4], VANILLA], ids=name_of)
def test_tokens_may_be_either_integer_type(config: ModelConfig) -> None:
    ids = random_ids(config, rows=2, blocks=1)[:, 0]
    model = build_model(config, lively_weights(config), torch_kernels())
    assert torch.equal(model.embed(ids), model.embed(ids.long()))
    scratch = model.new_scratch(2)
    context = torch.randn(2, config.block_decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    narrow = model.write_block(context, scratch, lambda logits, _place: logits.argmax(-1).int())
    wide = model.write_block(context, scratch, lambda logits, _place: logits.argmax(-1))
    assert narrow.dtype == torch.int32
    assert torch.equal(narrow.long(), wide)


@pytest.mark.parametrize("config", [CONFIGS[0], VANILLA], ids=name_of)
def test_prefill_needs_nothing_of_the_last_layer_behind_its_keys_and_values(config: ModelConfig) -> None:
    name = "block_decoder.gpt_neox" if isinstance(config, BlockTransformerConfig) else "gpt_neox"
    unread = (f"{name}.layers.2.attention.dense", f"{name}.layers.2.mlp", f"{name}.final_layer_norm")
    weights = lively_weights(config)
    without = {key: tensor * torch.nan if key.startswith(unread) else tensor for key, tensor in weights.items()}
    ids = random_ids(config, rows=2, blocks=9)
    runs = [PagedRun(build_model(config, tensors, torch_kernels()), rows=2) for tensors in (weights, without)]
    for run in runs:
        run.prefill([(0, 0, ids[0, :5]), (1, 0, ids[1, :9])])
    assert torch.equal(runs[0].keys.nan_to_num(), runs[1].keys.nan_to_num())
    assert torch.equal(runs[0].values.nan_to_num(), runs[1].values.nan_to_num())
    assert not runs[0].keys.isnan().all()
