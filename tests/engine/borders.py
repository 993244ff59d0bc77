"""Answers in which a character lies at every offset to the borders of blocks, and what their text has to be.

An answer is "xx(C)yz" with so many x in front; C is one character of 1 to 4 bytes, or of one that lacks its last.
"""

import codecs
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

import tokenizers

from engine.detokenizer import byte_level_table
from engine.tokenizer import Tokenizer
from tests.engine.tokenizers_of_tests import END_OF_TEXT, every_part

BLOCK = 4
OFFSETS = range(2 * BLOCK + 1)
"""Tokens in front of "(C)"."""
BEHIND = 2
"""Tokens behind it."""
WHOLE = [character.encode() for character in "aé漢😀"]
BROKEN = [character[:-1] for character in WHOLE[1:]]
CHARACTERS = WHOLE + BROKEN


class Expected(NamedTuple):
    """Text, tokens that count, and the stop string, if one was met."""

    text: str
    tokens: int
    stop: str | None


def answers(character: bytes) -> list[bytes]:
    """One for each offset."""
    return [b"x" * offset + b"(" + character + b")yz" for offset in OFFSETS]


def stops(character: bytes) -> list[tuple[str, ...]]:
    """The character is the stop string, or before, behind, within or at either end of it; or it only begins one."""
    read = character.decode("utf-8", "replace")
    one = [read, f"({read}", f"{read})", f"({read})", f"x({read})y", ")", "(", f"({read}{read}", f"{read})!"]
    return [(), *((stop,) for stop in one), (f"{read}{read}", ")y", f"({read}")]


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """The bytes as tokens in every way."""
    for borders in range(len(data)):
        for places in combinations(range(1, len(data)), borders):
            yield [data[start:end] for start, end in pairwise((0, *places, len(data)))]


def bytewise(data: bytes) -> list[bytes]:
    """A token a byte: every border inside a character is one of tokens."""
    return [bytes([byte]) for byte in data]


@cache
def tokenizer() -> Tokenizer:
    """Has a token for every part of "(C)", and the other bytes of the answers."""
    return Tokenizer(_parts(), END_OF_TEXT)


@cache
def _table() -> dict[bytes, int]:
    table = byte_level_table(_parts())
    assert table is not None
    return {part: token for token, part in enumerate(table)}


def _parts() -> tokenizers.Tokenizer:
    return every_part([b"xyz", *(b"(" + character + b")" for character in CHARACTERS)])


def ids(tokens: Sequence[bytes]) -> list[int]:
    """The tokens in the vocabulary."""
    return [_table()[token] for token in tokens]


def contents(token_ids: Sequence[int]) -> list[bytes]:
    """What tokens of the vocabulary stand for."""
    parts = list(_table())
    return [parts[token] for token in token_ids]


def complete(data: bytes) -> str:
    """The text of an answer that goes on: bytes that may still become a character are none yet."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def beginnings(tokens: Sequence[bytes]) -> list[str]:
    """The text after every token, if the answer goes on."""
    return [complete(data) for data in accumulate(tokens)]


def expected(tokens: Sequence[bytes], stop: tuple[str, ...], *, include: bool) -> Expected:
    """What the tokens read where a string of `stop` ends them, straight from the text of ever longer beginnings."""
    whole = b"".join(tokens).decode("utf-8", "replace")
    for count, text in [*enumerate(beginnings(tokens), 1), (len(tokens), whole)]:
        found = [(text.index(string), place) for place, string in enumerate(stop) if string in text]
        if found:
            start, place = min(found)
            return Expected(text[:start] + stop[place] * include, count, stop[place])
    return Expected(whole, len(tokens), None)


def handed_out(text: str, stop: tuple[str, ...]) -> str:
    """The text so far but for what may be the start of a stop string."""
    held = [length for string in stop for length in range(1, len(string)) if text.endswith(string[:length])]
    return text[: len(text) - max(held, default=0)]
