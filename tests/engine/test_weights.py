"""Loading weights: the golden models, every way a directory can be wrong, conversions, random weights."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ConfigError, ModelConfig
from engine.weights import WeightsError, expected_shapes, load_weights, random_weights
from tests.golden.cases import DIRECTORY, VANILLA, VARIANTS

CPU = torch.device("cpu")
NAME = "block_decoder.gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
GOLDEN = DIRECTORY / "lookup_prefix2"
CONFIG = ModelConfig.load(GOLDEN)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_weights(directory, CONFIG, dtype, CPU)


def write(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A model directory with the golden weights, changed."""
    tensors = load_file(GOLDEN / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def shard(directory: Path) -> Path:
    """A model directory with the golden weights in three shards."""
    tensors = load_file(GOLDEN / "model.safetensors")
    weight_map = {}
    for place, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-0000{place % 3 + 1}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_shapes_are_those_of_the_reference(variant: str) -> None:
    state = json.loads((DIRECTORY / variant / "resolved_config.json").read_text())["state_dict"]
    reference = {name: tuple(tensor["shape"]) for name, tensor in state.items()}
    reference.pop("block_decoder.gpt_neox.embed_in.weight", None)
    assert expected_shapes(ModelConfig.load(DIRECTORY / variant)) == reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_load_converts(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    write(tmp_path, lambda tensors: tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()}))
    golden = load_file(GOLDEN / "model.safetensors")
    tensors = load(tmp_path, dtype)
    assert tensors.keys() == expected_shapes(CONFIG).keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, golden[name].to(stored).to(dtype))


def test_shards(tmp_path: Path) -> None:
    whole, parts = load(GOLDEN), load(shard(tmp_path))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_do_not_depend_on_the_file_once_loaded(tmp_path: Path) -> None:
    tensors = load(write(tmp_path, lambda tensors: None))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensors[NAME], load_file(GOLDEN / "model.safetensors")[NAME])


def test_known_strays_are_ignored_and_others_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strays = {
        "block_decoder.gpt_neox.layers.0.attention.bias": torch.zeros(1, 1, 4, 4, dtype=torch.bool),
        "token_decoder.gpt_neox.layers.1.attention.masked_bias": torch.zeros(()),
        "block_decoder.gpt_neox.layers.2.attention.rotary_emb.inv_freq": torch.zeros(2),
    }
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path, lambda tensors: tensors.update(strays)))
        assert not caplog.records
        load(write(tmp_path, lambda tensors: tensors.update({"block_decoder.extra": torch.zeros(3)})))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "block_decoder.extra" in caplog.text


def test_strays_of_vanilla_checkpoints_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old versions of the library saved masks and frequencies."""
    tensors = load_file(DIRECTORY / VANILLA / "model.safetensors")
    strays = {
        "gpt_neox.layers.0.attention.bias": torch.zeros(1, 1, 4, 4, dtype=torch.bool),
        "gpt_neox.layers.1.attention.masked_bias": torch.zeros(()),
        "gpt_neox.layers.2.attention.rotary_emb.inv_freq": torch.zeros(2),
    }
    save_file(tensors | strays, tmp_path / "model.safetensors")
    loaded = load_weights(tmp_path, ModelConfig.load(DIRECTORY / VANILLA), torch.float32, CPU)
    assert loaded.keys() == tensors.keys()
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"lacks 1 of .* weights: {NAME}"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "block_decoder" in name], "lacks 38 .* more"),
        (lambda tensors: tensors.update({NAME: torch.zeros(64, 255)}), rf"{NAME} has shape \[64, 255\].*\[64, 256\]"),
        (lambda tensors: tensors.update({NAME: torch.zeros(64, 256).double()}), f"{NAME} is stored as F64"),
        (lambda tensors: tensors.update({NAME: torch.zeros(64, 256).to(torch.int8)}), f"{NAME} is stored as I8"),
        (lambda tensors: tensors[NAME][3, 5].fill_(torch.nan), f"{NAME} holds NaN or infinity"),
        (lambda tensors: tensors[NAME][3, 5].fill_(-torch.inf), f"{NAME} holds NaN or infinity"),
    ],
)
def test_bad_tensors(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load(write(tmp_path, change))


def test_a_weight_too_large_for_float16(tmp_path: Path) -> None:
    write(tmp_path, lambda tensors: tensors[NAME][3, 5].fill_(1e6))
    assert load(tmp_path, torch.bfloat16)[NAME][3, 5] > 9e5
    with pytest.raises(WeightsError, match=f"{NAME} does not fit in float16"):
        load(tmp_path, torch.float16)


def test_errors_are_config_errors() -> None:
    assert issubclass(WeightsError, ConfigError)


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor"):
        load(tmp_path)
    with pytest.raises(WeightsError, match="holds neither"):
        load(tmp_path / "missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "best.pt", "last.pth"])
def test_pickles_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match=f"{name}.*pickles.*convert them to model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    data = (GOLDEN / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(WeightsError, match="truncated or no safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"not a model at all, by no means", b"\xff" * 64, b"\x80\x04" + b"x" * 60])
def test_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="truncated or no safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {}}', "names of files beside it"),
        ('{"weight_map": {"a": 3}}', "names of files beside it"),
        ('{"weight_map": {"a": ["b"]}}', "weight_map"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "names of files beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names of files beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not there: gone.safetensors"),
    ],
)
def test_bad_index(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=message):
        load(tmp_path)


def test_index_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(WeightsError, match="not valid JSON"):
        load(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shard(tmp_path)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(WeightsError, match=r"is in both model-00001.* and model-00002"):
        load(tmp_path)


def test_random_weights() -> None:
    tensors = random_weights(CONFIG, torch.bfloat16, CPU, seed=3)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(CONFIG)
    assert all(tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert bool((tensors["block_decoder.gpt_neox.final_layer_norm.weight"] == 1).all())
    assert bool((tensors["token_decoder.expansion_layer.bias"] == 0).all())
    assert 0.015 < float(tensors[NAME].float().std()) < 0.025
    same, other = (random_weights(CONFIG, torch.bfloat16, CPU, seed=seed)[NAME] for seed in (3, 4))
    assert torch.equal(tensors[NAME], same)
    assert not torch.equal(tensors[NAME], other)
