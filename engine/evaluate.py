"""How well a model predicts given documents: loss in nats a token, and bits per byte of text.

A document is tokenised by itself and ends with end-of-text. One that is longer than a window is cut into windows that
stand alone, each but the last without end-of-text. Every token of a window but the first is predicted
(`engine.score_layout`); bytes are those of the tokens that are. With bits the sum of -log2 p over them:

    loss = ln 2 * bits / tokens        bits per byte = bits / bytes
"""

import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.tokenizer import Tokenizer
from engine.types import InvalidRequestError

PLAIN_END = "<|endoftext|>"
"""Closes a document where the tokenizer does not say how its end-of-text token reads."""


@dataclass
class DocumentScore:
    """Sums over predicted tokens."""

    tokens: int = 0
    bytes: int = 0
    bits: float = 0.0

    @property
    def loss(self) -> float:
        """Nats a token; NaN where nothing was predicted."""
        return math.log(2) * self.bits / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """NaN where no byte was predicted."""
        return self.bits / self.bytes if self.bytes else math.nan

    def add(self, other: "DocumentScore") -> None:
        """Take the other's sums in."""
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.bits += other.bits


def read_documents(path: Path, end: str) -> list[str]:
    """The documents of a text file, plain or compressed with xz, each closed by a line `end`; the last need not be.

    Raises InvalidRequestError for a file that cannot be read as UTF-8.
    """
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InvalidRequestError("file", f"cannot read {path}: {error}") from None
    *closed, rest = text.split(f"\n{end}\n")
    return [*closed, rest.removesuffix("\n")] if rest.strip() else closed


def cut_windows(token_ids: Sequence[int], window: int, eos_token_id: int) -> list[list[int]]:
    """A document's windows of at most `window` tokens, and end-of-text behind the last."""
    windows = [list(token_ids[start : start + window]) for start in range(0, len(token_ids), window)]
    if windows:
        windows[-1].append(eos_token_id)
    return windows


def window_score(token_ids: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> DocumentScore:
    """The sums of one window, from the logprobs of its last tokens."""
    skipped = len(token_ids) - len(logprobs)
    text_bytes = tokenizer.text_bytes(token_ids) - tokenizer.text_bytes(token_ids[:skipped])
    return DocumentScore(len(logprobs), text_bytes, -math.fsum(logprobs) / math.log(2))


def table(name: str, scores: Sequence[DocumentScore], *, each: bool) -> Iterator[str]:
    """Lines of tab-separated columns: each document's, if asked for, and the whole file's."""
    total = DocumentScore()
    for number, score in enumerate(scores):
        total.add(score)
        if each:
            yield _line(name, str(number), score)
    yield _line(name, "all", total)


HEADER = "file\tdocument\ttokens\tbytes\tloss\tbits_per_byte"


def _line(name: str, document: str, score: DocumentScore) -> str:
    return f"{name}\t{document}\t{score.tokens}\t{score.bytes}\t{score.loss:.4f}\t{score.bits_per_byte:.4f}"
