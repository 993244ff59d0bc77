"""The training text: reading the files, tokenising documents, laying them out in blocks and cutting windows.

Layout of a document (random padding): ``[pad x u][tokens][EOS][pad to the block border]``, ``u`` drawn anew every epoch
from ``0 .. block_length - 1``. Documents follow one another in one stream; nothing masks one from the next.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

DOCUMENT_END = "<|endoftext|>"
EOS_ID = 0
# Pads are embedded as id 0, but so is EOS, which is a real token. In the arrays of this module pads are therefore -1;
# the model's caller turns them into (id 0, mask False).
PAD = -1

TRAINING_FILES = {
    "tinystories": "train_tinystories_train.txt.xz",
    "storybooks": "train_storybooks_ccby.txt.xz",
    "fairytaleqa": "train_fairytaleqa_train.txt.xz",
    "children": "train_children_pd.txt.xz",
    "classics": "train_classics_pd.txt.xz",
}
HELDOUT_FILES = {
    "tinystories_heldout": "tinystories_heldout.txt.xz",
    "children_pd_heldout": "children_pd_heldout.txt.xz",
}

Blocks = NDArray[np.int16]


def read_documents(path: Path) -> list[str]:
    """Documents of one ``.txt.xz`` file, in order, without the closing line or the line break before it."""
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        text = file.read()
    parts = text.split(f"\n{DOCUMENT_END}\n")
    if parts[-1].strip():
        raise ValueError(f"{path.name}: the last document is not closed by a line {DOCUMENT_END}")
    return parts[:-1]


@dataclass(frozen=True)
class Source:
    """Tokenised documents of one file: ``ids`` holds all of them end to end (no EOS), ``lengths[i]`` tokens each."""

    ids: NDArray[np.uint16]
    lengths: NDArray[np.int64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document starts in ``ids``."""
        return np.cumsum(self.lengths) - self.lengths

    def split(self, last_share: float) -> tuple[Source, Source]:
        """All documents but the last ``last_share`` of them, and these (at least one document on either side)."""
        count = min(max(1, round(len(self.lengths) * last_share)), len(self.lengths) - 1)
        cut = int(self.lengths[:-count].sum())
        return Source(self.ids[:cut], self.lengths[:-count]), Source(self.ids[cut:], self.lengths[-count:])

    def documents(self) -> list[NDArray[np.uint16]]:
        """One array of ids per document."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Source:
    """Tokenise ``documents``; empty ones are dropped."""
    encoded = [e.ids for e in tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)]
    encoded = [ids for ids in encoded if ids]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    return Source(np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded]), lengths)


def save_sources(path: Path, sources: dict[str, Source]) -> None:
    """Keep tokenised sources in one ``.npz``, so that several runs tokenise once."""
    arrays = {f"{name}/{field}": getattr(s, field) for name, s in sources.items() for field in ("ids", "lengths")}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def load_sources(path: Path) -> dict[str, Source]:
    """Read what ``save_sources`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        names = [key.removesuffix("/ids") for key in file.files if key.endswith("/ids")]
        return {name: Source(file[f"{name}/ids"], file[f"{name}/lengths"]) for name in names}


def lay_out(ids: NDArray[np.uint16], padding: int, block_length: int) -> Blocks:
    """One document alone: ``[pad x padding][ids][EOS][pad]`` as int16 ``[blocks, block_length]``."""
    blocks = -(-(padding + len(ids) + 1) // block_length)
    flat = np.full(blocks * block_length, PAD, dtype=np.int16)
    flat[padding : padding + len(ids)] = ids
    flat[padding + len(ids)] = EOS_ID
    return flat.reshape(blocks, block_length)


def build_stream(source: Source, rng: np.random.Generator, block_length: int) -> tuple[Blocks, NDArray[np.int64]]:
    """One epoch: all documents in random order, each with its own random padding.

    Returns the blocks, int16 ``[blocks, block_length]``, and the index of every document's first block, ascending.
    """
    order = rng.permutation(len(source.lengths))
    lengths = source.lengths[order]
    padding = rng.integers(0, block_length, len(order))
    blocks = -(-(padding + lengths + 1) // block_length)
    starts = np.cumsum(blocks) - blocks
    flat = np.full(int(blocks.sum()) * block_length, PAD, dtype=np.int16)
    # Token k of the shuffled documents moves from `source.ids[k + shift_in]` to `flat[k + shift_out]`.
    k = np.arange(len(source.ids), dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    shift_in = np.repeat(source.offsets[order] - before, lengths)
    first = starts * block_length + padding
    shift_out = np.repeat(first - before, lengths)
    flat[k + shift_out] = source.ids[k + shift_in].astype(np.int16)
    flat[first + lengths] = EOS_ID
    return flat.reshape(-1, block_length), starts


@dataclass(frozen=True)
class WindowOptions:
    """How windows are cut from a stream.

    ``start_share``: share of windows moved to the nearest document start. A served sequence begins with a document and
    has nothing before it; windows cut anywhere would hardly ever show that.
    ``eos_share``: share of those that get one block of id 0 in front, as a served prompt of just EOS has.
    """

    window_blocks: int
    block_length: int = 4
    start_share: float = 0.5
    eos_share: float = 0.1


def window_starts(
    stream_blocks: int, document_starts: NDArray[np.int64], options: WindowOptions, rng: np.random.Generator
) -> NDArray[np.int64]:
    """First blocks of one epoch's windows, shuffled: a tiling at a random offset, part of it moved to documents."""
    window = options.window_blocks
    last = stream_blocks - window
    tiles = np.arange(int(rng.integers(0, min(window, last + 1))), last + 1, window, dtype=np.int64)
    right = np.searchsorted(document_starts, tiles)
    after = document_starts[np.minimum(right, len(document_starts) - 1)]
    before = document_starts[np.maximum(right - 1, 0)]
    nearest = np.where(np.abs(after - tiles) < np.abs(tiles - before), after, before)
    moved = (rng.random(len(tiles)) < options.start_share) & (np.abs(nearest - tiles) < window) & (nearest <= last)
    starts: NDArray[np.int64] = rng.permutation(np.where(moved, nearest, tiles))
    return starts


def windows(source: Source, options: WindowOptions, rng: np.random.Generator) -> Iterator[Blocks]:
    """Endless windows, int16 ``[window_blocks, block_length]`` with pads as -1.

    Every epoch is shuffled and padded anew.
    """
    while True:
        stream, document_starts = build_stream(source, rng, options.block_length)
        while len(stream) < 2 * options.window_blocks:
            more, more_starts = build_stream(source, rng, options.block_length)
            document_starts = np.concatenate([document_starts, more_starts + len(stream)])
            stream = np.concatenate([stream, more])
        at_start = np.zeros(len(stream), dtype=bool)
        at_start[document_starts] = True
        for start in window_starts(len(stream), document_starts, options, rng):
            window = stream[start : start + options.window_blocks]
            if at_start[start] and rng.random() < options.eos_share:
                eos_block = np.full((1, options.block_length), EOS_ID, dtype=np.int16)
                window = np.concatenate([eos_block, window[:-1]])
            yield window


class Mixer:
    """Draws batches of windows from several sources by weight; one endless iterator of windows per source."""

    def __init__(self, iterators: dict[str, Iterator[Blocks]], rng: np.random.Generator) -> None:
        self._iterators = iterators
        self._rng = rng

    def batch(self, size: int, weights: dict[str, float]) -> Blocks:
        """int16 ``[size, window_blocks, block_length]``; ``weights`` need not add up to 1."""
        names = [name for name in self._iterators if weights.get(name, 0.0) > 0.0]
        shares = np.array([weights[name] for name in names])
        drawn = self._rng.choice(len(names), size=size, p=shares / shares.sum())
        return np.stack([next(self._iterators[names[i]]) for i in drawn])
