"""Token ids to text, a few at a time: no piece of text ever ends inside a character, and nothing is lost.

For byte-level vocabularies, what a decoder returns, joined, equals decoding all ids at once, whatever the ids.
"""

import codecs
import json
from collections.abc import Sequence
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream


class IncrementalDecoder(Protocol):
    """Decodes one answer."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """The text that was held back for tokens that do not come. The decoder is of no use after that."""


class ByteLevelDecoder:
    """For byte-level vocabularies, where a token is a string of bytes and may end inside a character.

    Bytes that are not UTF-8 become U+FFFD, one for each maximal part of a character (Unicode 3.9, as tokenizers does).
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete. Ids outside the vocabulary stand for nothing."""
        table = self._token_bytes
        return self._utf8.decode(b"".join([table[token] for token in token_ids if token < len(table)]))

    def finish(self) -> str:
        """U+FFFD where the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


class StreamDecoder:
    """For any other vocabulary, over the tokenizers library's own stream.

    That stream may hold text back, or refuse to go on, where bytes are broken: `finish` makes up for it. Some decoders
    change earlier text when later tokens come (a byte fallback that turns out not to be UTF-8 spoils its whole run);
    what was handed out already stays then, and only the rest is as decoding all ids at once has it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._length = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        text = "".join(self._step(token) for token in token_ids)
        self._token_ids += token_ids
        self._length += len(text)
        return text

    def finish(self) -> str:
        """What decoding all tokens at once adds to the text so far."""
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        return text[self._length :]

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the library raises nothing more specific
            return ""


def byte_level_table(tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool = True) -> list[bytes] | None:
    """The bytes of every token id; None where the vocabulary is not byte-level. Special tokens have none if skipped.

    A byte-level vocabulary writes each byte as one character: the printable characters of Latin-1 stand for themselves,
    and the other bytes, in order, for U+0100 and on. A token with any other character stands for its own UTF-8.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"]
    if decoder is None or decoder["type"] != "ByteLevel":
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder().items() if skip_special_tokens else ()
    skipped = {token for token, one in added if one.special}
    byte_of = _byte_level_alphabet()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for content, token in vocabulary.items():
        if token not in skipped:
            table[token] = _to_bytes(content, byte_of)
    return table


def _byte_level_alphabet() -> dict[str, int]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _to_bytes(content: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in content])
    except KeyError:
        return content.encode()
