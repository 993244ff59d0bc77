"""Writes and reads a model folder: ``config.json``, safetensors shards with their index, tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.model import BlockTransformer, ModelConfig
from training.tokenizer import save_tokenizer

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def plan_shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names for each shard, in order, so that no shard holds more than ``limit`` bytes of tensors."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > limit:
            raise ValueError(f"{name} alone is larger than a shard")
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def save_model(
    model: BlockTransformer,
    folder: Path,
    dtype: str = "float16",
    tokenizer: Tokenizer | None = None,
    limit: int = 14_000_000,
) -> None:
    """Write the model's folder, weights rounded to ``dtype``, shards of at most ``limit`` bytes of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    tensors = {name: t.detach().to("cpu", DTYPES[dtype]).contiguous() for name, t in model.state_dict().items()}
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError(f"a weight is not finite in {dtype}")
    shards = plan_shards(tensors, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", model.config.to_json(dtype))
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, model.config.max_length)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with a final line break."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> BlockTransformer:
    """Read a model folder; the weights become fp32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)
    model = BlockTransformer(ModelConfig.from_json(config))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a model folder's tokenizer."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
