"""Trains the default model from the text files: tokenizer, training, export, held-out figures, in one command.

    python -m training.train --corpus DIR --out DIR

A GPU is used where there is one (bf16 autocast, torch.compile); small runs work on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import (
    HELDOUT_FILES,
    TRAINING_FILES,
    Blocks,
    Mixer,
    Source,
    WindowOptions,
    encode,
    load_sources,
    read_documents,
    save_sources,
    windows,
)
from training.evaluate import bits_per_byte, evaluate_heldout, ratio, token_bytes
from training.export import load_model, save_model, write_json
from training.model import BlockTransformer, DecoderConfig, ModelConfig, training_loss
from training.muon import Muon
from training.tokenizer import tokenizer_texts, train_tokenizer

# Shares of the windows drawn from each source, in the first and in the last part of the steps.
EARLY_MIX = {"tinystories": 0.25, "storybooks": 0.05, "fairytaleqa": 0.08, "children": 0.37, "classics": 0.25}
LATE_MIX = {"tinystories": 0.60, "storybooks": 0.10, "fairytaleqa": 0.10, "children": 0.20}
# Share of windows moved to a document's start: few for the novels, whose chapters are longer than a window.
START_SHARE = {"tinystories": 0.8, "storybooks": 0.8, "fairytaleqa": 0.4, "children": 0.3, "classics": 0.2}


@dataclass(frozen=True)
class TrainOptions:
    """Everything that shapes a run; each field is a flag of the same name."""

    steps: int = 6600
    batch_tokens: int = 65536
    long_window: int = 2048
    """Tokens of a long window: the context served."""
    short_window: int = 512
    """Tokens of a short window; most of these begin with a document."""
    short_share: float = 0.5
    """Share of the steps made of short windows."""
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-5
    warmup: int = 200
    weight_decay: float = 0.1
    beta2: float = 0.95
    muon_rate: float = 2.0
    """Learning rate of Muon for the layers' matrices, as a multiple of AdamW's; 0: AdamW for all."""
    dropout: float = 0.1
    late_share: float = 0.25
    """Last part of the steps, trained with the late mix."""
    eos_share: float = 0.1
    seed: int = 0
    log_every: int = 20
    validate_every: int = 1320
    early_mix: dict[str, float] = field(default_factory=lambda: dict(EARLY_MIX))
    late_mix: dict[str, float] = field(default_factory=lambda: dict(LATE_MIX))

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: linear warmup, then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine

    def mix(self, step: int) -> dict[str, float]:
        """Weights of the sources at ``step``."""
        return self.early_mix if step < self.steps * (1 - self.late_share) else self.late_mix


def batches(sources: dict[str, Source], options: TrainOptions, block_length: int) -> Iterator[Blocks]:
    """One batch per step, int16 ``[windows, blocks, block_length]``, all of ``batch_tokens`` tokens."""
    rng = np.random.default_rng(options.seed)
    mixers = {}
    for length in (options.long_window, options.short_window):
        iterators = {}
        for name, source in sources.items():
            share = START_SHARE.get(name, 0.5)
            cut = WindowOptions(length // block_length, block_length, share, options.eos_share)
            iterators[name] = windows(source, cut, np.random.default_rng(rng.integers(2**63)))
        mixers[length] = Mixer(iterators, np.random.default_rng(rng.integers(2**63)))
    for step in range(options.steps):
        length = options.short_window if rng.random() < options.short_share else options.long_window
        yield mixers[length].batch(options.batch_tokens // length, options.mix(step))


def prefetch(items: Iterator[Blocks], device: torch.device, depth: int = 8) -> Iterator[Tensor]:
    """Make batches in a thread, ahead of the device."""

    def make() -> Tensor | None:
        item = next(items, None)
        if item is None:
            return None
        tensor = torch.from_numpy(item)
        return tensor.pin_memory() if device.type == "cuda" else tensor

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque(pool.submit(make) for _ in range(depth))
        while (tensor := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(make))
            yield tensor.to(device, non_blocking=True)


def layer_matrices(model: BlockTransformer) -> list[Tensor]:
    """The weights that Muon takes: all matrices but the token tables and the output."""
    named = model.named_parameters()
    return [p for name, p in named if p.dim() > 1 and (".layers." in name or "expansion_layer" in name)]


def make_optimizer(parameters: Sequence[Tensor], options: TrainOptions, fused: bool) -> torch.optim.AdamW:
    """AdamW; norms and biases do not decay."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, options.beta2), fused=fused)


def loss_function(model: BlockTransformer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The training loss of a batch of blocks; on a GPU compiled and in bf16 autocast."""
    if device.type != "cuda":
        return lambda blocks: training_loss(model, blocks)
    compiled = torch.compile(lambda blocks: training_loss(model, blocks), dynamic=False)

    def loss(blocks: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return compiled(blocks)

    return loss


def train(
    model: BlockTransformer,
    sources: dict[str, Source],
    options: TrainOptions,
    log: Callable[[dict[str, Any]], None],
    validate: Callable[[BlockTransformer], dict[str, float]] | None = None,
) -> None:
    """Train ``model`` in place."""
    device = next(model.parameters()).device
    matrices = layer_matrices(model) if options.muon_rate else []
    muon = Muon(matrices, options.weight_decay)
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizer = make_optimizer(rest, options, fused=device.type == "cuda")
    loss_of = loss_function(model, device)
    begin = time.monotonic()
    model.train()
    for step, blocks in enumerate(prefetch(batches(sources, options, model.config.block_length), device)):
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        loss = loss_of(blocks)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        muon.step(options.rate(step) * options.muon_rate)
        model.zero_grad(set_to_none=True)
        last = step + 1 == options.steps
        if step % options.log_every == 0 or last:
            record = {"step": step, "loss": loss.item(), "norm": norm.item(), "rate": options.rate(step)}
            log(record | {"window": blocks.shape[1], "seconds": time.monotonic() - begin})
        if validate is not None and (last or (step + 1) % options.validate_every == 0):
            log({"step": step, "validation": validate(model.eval())})
            model.train()


def prepare(
    corpus: Path, out: Path, vocab_size: int, tokenizer: Path | None, tokens: Path | None
) -> tuple[Tokenizer, dict[str, Source]]:
    """The tokenizer and all tokenised training files, made from the corpus or read from earlier runs' files."""
    documents = {}
    if tokenizer is None or tokens is None:
        documents = {name: read_documents(corpus / file) for name, file in TRAINING_FILES.items()}
    bpe = Tokenizer.from_file(str(tokenizer)) if tokenizer else train_tokenizer(tokenizer_texts(documents), vocab_size)
    if tokens is not None:
        return bpe, load_sources(tokens)
    sources = {name: encode(bpe, texts) for name, texts in documents.items()}
    save_sources(out / "tokens.npz", sources)
    return bpe, sources


def make_validation(
    held_back: dict[str, Source], tokenizer: Tokenizer
) -> Callable[[BlockTransformer], dict[str, float]]:
    """Bits per byte, evaluation layout, on the documents held back from each training file."""
    sizes = token_bytes(tokenizer)
    documents = {name: source.documents() for name, source in held_back.items()}

    def validate(model: BlockTransformer) -> dict[str, float]:
        u = model.config.block_length - 1
        return {name: ratio(bits_per_byte(model, texts, sizes, u)) for name, texts in documents.items()}

    return validate


def parse_mix(text: str) -> dict[str, float]:
    """``tinystories=0.5,children=0.5`` as a dict."""
    return {name: float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: files, sizes, and one flag for each field of ``TrainOptions``."""
    parser = argparse.ArgumentParser(description="Train the default model.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the .txt.xz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, log and figures")
    parser.add_argument("--tokenizer", type=Path, help="an existing tokenizer.json instead of training one")
    parser.add_argument("--tokens", type=Path, help="tokens.npz of an earlier run with the same tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256, help="hidden size of both decoders")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--block-layers", type=int, default=7)
    parser.add_argument("--token-layers", type=int, default=5)
    parser.add_argument("--dtype", default="float16", help="stored dtype of the exported weights")
    parser.add_argument("--validation-share", type=float, default=0.01, help="documents held back from each file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option in fields(TrainOptions):
        flag = "--" + option.name.replace("_", "-")
        if option.name.endswith("_mix"):
            parser.add_argument(flag, type=parse_mix, default=EARLY_MIX if "early" in flag else LATE_MIX)
        else:
            parser.add_argument(flag, type=type(option.default), default=option.default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parsed = parse_arguments(arguments)
    options = TrainOptions(**{f.name: getattr(parsed, f.name) for f in fields(TrainOptions)})
    parsed.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("highest")
    tokenizer, sources = prepare(parsed.corpus, parsed.out, parsed.vocab_size, parsed.tokenizer, parsed.tokens)
    split = {name: source.split(parsed.validation_share) for name, source in sources.items()}
    sizes = {"hidden_size": parsed.width, "num_heads": parsed.heads, "intermediate_size": 4 * parsed.width}
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_length=options.long_window,
        embedder_size=parsed.width // 4,
        block_decoder=DecoderConfig(num_layers=parsed.block_layers, **sizes),
        token_decoder=DecoderConfig(num_layers=parsed.token_layers, **sizes),
    )
    model = BlockTransformer(config, options.dropout)
    model.initialise()
    model.to(parsed.device)
    trained = {name: early for name, (early, _) in split.items()}
    validate = make_validation({name: late for name, (_, late) in split.items()}, tokenizer)
    begin = time.monotonic()
    with (parsed.out / "log.jsonl").open("w", encoding="utf-8", buffering=1) as log_file:

        def log(record: dict[str, Any]) -> None:
            log_file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)

        train(model, trained, options, log, validate)
    seconds = time.monotonic() - begin
    save_model(model, parsed.out, parsed.dtype, tokenizer)
    device_name = torch.cuda.get_device_name() if parsed.device.startswith("cuda") else "none"
    run = {
        "options": asdict(options),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": options.steps * options.batch_tokens,
        "training_tokens_in_files": {name: int(source.lengths.sum()) for name, source in trained.items()},
        "seconds": round(seconds, 1),
        "gpu": device_name,
        "torch": torch.__version__,
    }
    write_json(parsed.out / "run.json", run)
    if all((parsed.corpus / file).exists() for file in HELDOUT_FILES.values()):
        stored = load_model(parsed.out).to(parsed.device).eval()
        heldout = evaluate_heldout(stored, tokenizer, parsed.corpus, range(config.block_length))
        write_json(parsed.out / "heldout.json", heldout)
        print(json.dumps(heldout))


if __name__ == "__main__":
    main()
