"""Directories of the shapes that are measured, with random weights, to load or to serve.

python -m benchmarks.model_files block-302M DIR --tokenizer tokenizer.json [--device cuda]
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness import WEIGHTS_SEED
from benchmarks.models import MODELS, BenchmarkModel
from engine.config import DTYPES, ModelConfig, VanillaConfig
from engine.weights import random_weights


def write_model(
    model: BenchmarkModel, directory: Path, dtype: str, *, device: str = "cpu", tokenizer: Path | None = None
) -> None:
    """Write config.json, safetensors with weights drawn on `device`, and a tokenizer to be served with."""
    config = model.config.model_copy(update={"dtype": dtype})
    (directory / "config.json").write_text(json.dumps(config_file(config)), encoding="utf-8")
    where = torch.device(device)
    tensors = random_weights(model.config, getattr(torch, dtype), where, WEIGHTS_SEED, drawn_on=where)
    save_file(tensors, directory / "model.safetensors")
    if tokenizer is not None:
        shutil.copy(tokenizer, directory / "tokenizer.json")


def config_file(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model: of a vanilla one, as Hugging Face's library writes it."""
    if not isinstance(config, VanillaConfig):
        return config.model_dump(exclude_none=True)
    decoder = config.block_decoder
    return {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": config.max_length,
        "eos_token_id": config.eos_token_id,
        "layer_norm_eps": decoder.layer_norm_eps,
        "rotary_pct": decoder.rotary_pct,
        "rotary_emb_base": decoder.rotary_base,
        "torch_dtype": config.dtype,
    }


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, without which it cannot be served")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    model, tokenizer = MODELS[options.model], options.tokenizer
    write_model(model, options.directory, options.dtype, device=options.device, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
