import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.config import BlockTransformerConfig, ConfigError, DecoderConfig, EngineConfig, ModelConfig, VanillaConfig
from tests.golden.cases import DIRECTORY, VANILLA

BLOCK_TRANSFORMER: dict[str, Any] = {
    "vocab_size": 512,
    "block_length": 4,
    "max_length": 64,
    "embedder": {"hidden_size": 16},
    "block_decoder": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256},
    "token_decoder": {
        "num_layers": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 128,
        "strategy": "prefix", "prefix_length": 2,
    },
}  # fmt: skip


def changed(path: str, value: object) -> dict[str, Any]:
    """The configuration with one field at a dotted path set, or deleted where `value` is ..."""
    data = copy.deepcopy(BLOCK_TRANSFORMER)
    *parents, name = path.split(".")
    target = data
    for parent in parents:
        target = target[parent]
    if value is ...:
        del target[name]
    else:
        target[name] = value
    return data


def test_a_small_configuration_and_what_follows_from_it() -> None:
    config = BlockTransformerConfig.parse(BLOCK_TRANSFORMER)
    assert (config.eos_token_id, config.prompt_alignment, config.dtype) == (0, "left_pad", "float32")
    assert (config.block_decoder.head_size, config.block_decoder.rotary_dims) == (16, 4)
    assert (config.expanded_vectors, config.token_decoder_positions, config.max_positions) == (2, 5, 16)


def test_summation_expands_to_a_vector_for_each_token_of_a_block() -> None:
    data = changed("token_decoder.strategy", "summation")
    del data["token_decoder"]["prefix_length"]
    config = BlockTransformerConfig.parse(data)
    assert (config.expanded_vectors, config.token_decoder_positions) == (4, 4)


@pytest.mark.parametrize(("max_length", "positions"), [(63, 16), (64, 16), (65, 17)])
def test_the_longest_request_rounds_up_to_blocks(max_length: int, positions: int) -> None:
    assert BlockTransformerConfig.parse(changed("max_length", max_length)).max_positions == positions


def test_a_projection_layer_may_have_any_width() -> None:
    data = changed("embedder.projection", "projection_layer")
    data["embedder"]["hidden_size"] = 64
    assert BlockTransformerConfig.parse(data).embedder.hidden_size == 64


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size: Input should be greater than 0 (got '0')"),
        ("vocab_size", ..., "vocab_size: Field required"),
        ("vocab_size", "512", "vocab_size: Input should be a valid integer (got '512')"),
        ("vocab_size", 1 << 40, "vocab_size: Input should be less than or equal to"),
        ("block_length", 65, "block_length: Input should be less than or equal to 64"),
        ("max_length", 7, "max_length 7 is under two blocks of 4: nothing could be generated"),
        ("prompt_alignment", "right", "prompt_alignment: Input should be 'left_pad' or 'forced_tail'"),
        ("model_type", "gpt_neox", "model_type: Input should be 'block_transformer' (got 'gpt_neox')"),
        ("eos_token_id", 512, "eos_token_id 512 is outside the vocabulary of 512"),
        ("eos_token_id", -1, "eos_token_id: Input should be greater than or equal to 0"),
        ("embedder.pad_token_id", 512, "embedder.pad_token_id 512 is outside the vocabulary of 512"),
        ("embedder.hidden_size", 32, "embedder.hidden_size x block_length is 128, but block_decoder.hidden_size is 64"),
        ("embedder.type", "roberta", "embedder.type: Input should be 'lookup'"),
        ("block_decoder.num_heads", 3, "block_decoder: hidden_size 64 is not a multiple of num_heads 3"),
        ("block_decoder.num_heads", 1 << 20, "block_decoder: hidden_size 64 is not a multiple of num_heads 1048576"),
        ("block_decoder.num_heads", 64, "block_decoder: head size (hidden_size / num_heads) is 1; it has to be one of"),
        ("block_decoder.rotary_pct", 0.2, "block_decoder: rotary_pct 0.2 rotates 3 dimensions of each head"),
        ("block_decoder.rotary_pct", 0.01, "block_decoder: rotary_pct 0.01 rotates 0 dimensions of each head"),
        ("block_decoder.rotary_pct", math.nan, "block_decoder.rotary_pct: "),
        ("block_decoder.layer_norm_eps", 0.0, "block_decoder.layer_norm_eps: Input should be greater than 0"),
        ("token_decoder.prefix_length", ..., 'token_decoder: prefix_length is missing, which strategy "prefix" needs'),
        ("token_decoder.prefix_length", 0, "token_decoder.prefix_length: Input should be greater than or equal to 1"),
        ("token_decoder.strategy", "summation", 'token_decoder: prefix_length goes with strategy "prefix" only'),
        (
            "token_decoder.strategy",
            "cross_attention",
            "token_decoder.strategy: Input should be 'prefix' or 'summation'",
        ),
        ("dropout", 0.1, "dropout: Extra inputs are not permitted"),
        ("block_decoder.bias", True, "block_decoder.bias: Extra inputs are not permitted"),
    ],
)
def test_the_field_at_fault_is_named(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BlockTransformerConfig.parse(changed(path, value), source="here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


def test_every_fault_is_reported_at_once() -> None:
    data = changed("vocab_size", 0)
    data["block_length"] = 0
    with pytest.raises(ConfigError, match=r"vocab_size: .*; block_length: "):
        BlockTransformerConfig.parse(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*config.json: No such file"),
        (b"{", "config.json is not valid JSON"),
        (b"\xff", "config.json is not valid JSON"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[]", "config.json has to hold a JSON object"),
        (b"{}", "config.json: vocab_size: Field required"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.load(tmp_path)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = BlockTransformerConfig.parse(BLOCK_TRANSFORMER)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))
    assert ModelConfig.load(tmp_path) == config


PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
"""As the hub has it for the model of 6 layers."""


def test_hugging_faces_file_of_a_pythia_model() -> None:
    config = ModelConfig.parse(PYTHIA)
    assert isinstance(config, VanillaConfig)
    assert (config.vocab_size, config.max_length, config.eos_token_id, config.dtype) == (50304, 2048, 0, "float16")
    assert (config.block_length, config.max_positions) == (1, 2048)
    assert config.block_decoder == DecoderConfig(
        num_layers=6, hidden_size=512, num_heads=8, intermediate_size=2048, rotary_pct=0.25, rotary_base=10000.0
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500, "rope_type": "default"}},
        {"rope_scaling": {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "type": "default"}},
        {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "rotary_pct": 0.5, "rope_scaling": None},
    ],
)
def test_versions_write_the_rotary_embedding_in_different_places(changes: dict[str, Any]) -> None:
    plain = {name: value for name, value in PYTHIA.items() if not name.startswith("rotary")}
    decoder = ModelConfig.parse(plain | changes).block_decoder
    assert (decoder.rotary_pct, decoder.rotary_base) == (0.5, 500.0)
    unsaid = ModelConfig.parse(plain).block_decoder
    assert (unsaid.rotary_pct, unsaid.rotary_base) == (0.25, 10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_parallel_residual": False}, "use_parallel_residual: Input should be True (got 'False')"),
        ({"hidden_act": "gelu_new"}, "hidden_act: Input should be 'gelu' (got 'gelu_new')"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: Input should be False"),
        ({"attention_bias": False}, "attention_bias: Input should be True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: Input should be None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: Input should be 'default'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type: Input should be 'default'"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rotary_emb_base, or rope_theta, has several values: [7.0, 10000"),
        ({"partial_rotary_factor": 1.0}, "rotary_pct, or partial_rotary_factor, has several values: [0.25, 1.0]"),
        ({"eos_token_id": [0, 2]}, "eos_token_id: Input should be a valid integer"),
        ({"eos_token_id": None}, "eos_token_id: Input should be a valid integer"),
        ({"eos_token_id": 50304}, "eos_token_id 50304 is outside the vocabulary of 50304"),
        ({"dtype": "float64"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"num_attention_heads": 7}, "hidden_size 512 is not a multiple of num_heads 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: Input should be greater than 0"),
        ({"max_position_embeddings": 1}, "max_position_embeddings: Input should be greater than or equal to 2"),
        ({"model_type": "gptj"}, "model_type: Input should be 'block_transformer' or 'gpt_neox' (got 'gptj')"),
        ({"model_type": ["gpt_neox"]}, "model_type: Input should be 'block_transformer' or 'gpt_neox'"),
    ],
)
def test_what_a_vanilla_model_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse(PYTHIA | changes, source="here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "eos_token_id", "max_position_embeddings"])
def test_a_vanilla_model_says_its_sizes(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: Field required"):
        ModelConfig.parse({key: value for key, value in PYTHIA.items() if key != name})


def test_a_model_of_another_kind_is_refused() -> None:
    assert isinstance(ModelConfig.load(DIRECTORY / VANILLA), VanillaConfig)
    with pytest.raises(ConfigError, match=r"config.json: model_type: .* 'block_transformer' \(got 'gpt_neox'"):
        BlockTransformerConfig.load(DIRECTORY / VANILLA)


def test_configurations_are_frozen() -> None:
    config = BlockTransformerConfig.parse(BLOCK_TRANSFORMER)
    with pytest.raises(ValueError, match="frozen"):
        config.vocab_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert EngineConfig.create(device=device).device == device


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "tpu"}, 'device "tpu" is none of cpu, cuda, cuda:N'),
        ({"device": "cuda:"}, 'device "cuda:" is none of'),
        ({"device": "cpu\n"}, "is none of"),
        ({"max_rows": 0}, "max_rows: Input should be greater than or equal to 1"),
        ({"max_rows": 2048}, "max_step_positions 2048 has to exceed max_rows 2048"),
        ({"max_waiting": 0}, "max_waiting: "),
        ({"page_size": 17}, "page_size: Input should be 8, 16, 32 or 64"),
        ({"kv_bytes": 0}, "kv_bytes: "),
        ({"memory_fraction": 1.0}, "memory_fraction: "),
        ({"rows": 3}, "rows: Extra inputs are not permitted"),
    ],
)
def test_engine_settings_that_cannot_work_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create(**values)
    assert message in str(caught.value)
