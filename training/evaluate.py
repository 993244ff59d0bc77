"""Bits per byte of a model on held-out text.

Definition. A document stands alone, laid out as ``[pad x u][tokens][EOS][pad]``. Block 0 is not predicted. Bits are the
sum of ``-log2 p`` over all predicted tokens, EOS included, pads excluded; bytes are the UTF-8 bytes of the document's
text less those of its tokens that are not predicted. A document longer than the context is cut into consecutive windows
of at most ``max_length - u`` tokens, each laid out alone (EOS after the last only). ``u = block_length - 1`` is the
evaluation layout: every token but the first is predicted.

    python -m training.evaluate --model engine/default_model --corpus DIR
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.corpus import EOS_ID, HELDOUT_FILES, PAD, Blocks, lay_out, read_documents
from training.export import load_model, load_tokenizer
from training.model import BlockTransformer, split_padding

COMPARISON_DOCUMENTS = 200


@dataclass(frozen=True)
class Window:
    """One piece of a document: its blocks (pads -1) and the bytes of the tokens that blocks 1.. predict."""

    document: int
    blocks: Blocks
    predicted_bytes: int


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes that every id stands for: in a byte-level vocabulary, one letter of a token is one byte."""
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        sizes[i] = 0 if i == EOS_ID else len(token)
    return sizes


def cut_windows(
    documents: Sequence[NDArray[np.uint16]], sizes: NDArray[np.int64], u: int, block_length: int, max_length: int
) -> list[Window]:
    """Every document's windows with ``u`` pads in front."""
    found = []
    for number, ids in enumerate(documents):
        span = max_length - u
        for start in range(0, len(ids), span):
            piece = ids[start : start + span]
            blocks = lay_out(piece, u, block_length)
            if start + span < len(ids):
                blocks = np.where(np.arange(blocks.size) < u + len(piece), blocks.ravel(), PAD).astype(np.int16)
                blocks = blocks.reshape(-1, block_length)[: -(-(u + len(piece)) // block_length)]
            found.append(Window(number, blocks, int(sizes[piece[block_length - u :]].sum())))
    return found


@torch.no_grad()
def window_bits(model: BlockTransformer, windows: Sequence[Window], batch_blocks: int = 4096) -> NDArray[np.float64]:
    """Bits of every window, batched by length (padding on the right changes nothing: the model is causal)."""
    device = next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].blocks))
    bits = np.zeros(len(windows))
    while order:
        longest = len(windows[order[-1]].blocks)
        chosen = [order.pop() for _ in range(min(len(order), max(1, batch_blocks // longest)))]
        batch = np.full((len(chosen), longest, model.config.block_length), PAD, dtype=np.int16)
        for row, index in enumerate(chosen):
            batch[row, : len(windows[index].blocks)] = windows[index].blocks
        ids, mask = split_padding(torch.from_numpy(batch).to(device))
        logits = model(ids, mask)
        nats = F.cross_entropy(logits.flatten(0, 2).float(), ids[:, 1:].flatten(), reduction="none")
        nats = nats.view(len(chosen), -1) * mask[:, 1:].flatten(1)
        bits[chosen] = (nats.double().sum(1) / math.log(2)).cpu().numpy()
    return bits


def bits_per_byte(
    model: BlockTransformer,
    documents: Sequence[NDArray[np.uint16]],
    sizes: NDArray[np.int64],
    u: int,
    max_length: int | None = None,
) -> list[tuple[float, int]]:
    """``(bits, bytes)`` of every document in the layout with ``u`` pads; sum both, then divide."""
    config = model.config
    windows = cut_windows(documents, sizes, u, config.block_length, max_length or config.max_length)
    totals = [[0.0, 0] for _ in documents]
    for window, bits in zip(windows, window_bits(model, windows), strict=True):
        totals[window.document][0] += float(bits)
        totals[window.document][1] += window.predicted_bytes
    return [(bits, int(count)) for bits, count in totals]


def ratio(pairs: Sequence[tuple[float, int]]) -> float:
    """Bits per byte of several documents together."""
    return sum(bits for bits, _ in pairs) / sum(count for _, count in pairs)


def evaluate_heldout(
    model: BlockTransformer, tokenizer: Tokenizer, corpus: Path, paddings: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Bits per byte on both held-out files for each padding u, their mean, and the mean over the first documents."""
    sizes = token_bytes(tokenizer)
    results: dict[str, dict[str, float]] = {}
    for name, file in HELDOUT_FILES.items():
        documents = [
            np.array(e.ids, dtype=np.uint16)
            for e in tokenizer.encode_batch_fast(read_documents(corpus / file), add_special_tokens=False)
        ]
        pairs = {u: bits_per_byte(model, documents, sizes, u) for u in paddings}
        figures = {f"u={u}": ratio(p) for u, p in pairs.items()}
        figures["mean"] = sum(figures.values()) / len(paddings)
        first = [ratio(p[:COMPARISON_DOCUMENTS]) for p in pairs.values()]
        figures[f"mean, first {COMPARISON_DOCUMENTS} documents"] = sum(first) / len(first)
        results[name] = figures
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Bits per byte of an exported model on the held-out files.")
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json, tokenizer.json and weights")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the held-out .txt.xz files")
    parser.add_argument("--device", default="cpu", help="where to compute, always in fp32 (default: cpu)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    model = load_model(arguments.model).to(arguments.device).eval()
    paddings = range(model.config.block_length)
    results = evaluate_heldout(model, load_tokenizer(arguments.model), arguments.corpus, paddings)
    for name, figures in results.items():
        print(name, *(f"{key}: {value:.4f}" for key, value in figures.items()), sep="\n  ")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
