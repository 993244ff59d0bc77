"""How few tokens a text can have, known without tokenising it."""

import json
from typing import Any

import tokenizers


def longest_token_bytes(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The most bytes of text that one token can stand for; None where there is no such bound.

    There is one where every byte of a text ends up in a token: byte-level vocabularies without a normalizer, whose
    splitting removes nothing and whose added tokens take no blanks around them in.
    """
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    if parts["normalizer"] is not None or not _keeps_every_byte(parts["pre_tokenizer"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]):
        return None
    # One character of a byte-level token is one byte of text; an added token is written as it is.
    added = [len(token["content"].encode()) for token in parts["added_tokens"]]
    return max(added + [len(content) for content in tokenizer.get_vocab(with_added_tokens=False)], default=None)


def _keeps_every_byte(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kept = all(
        step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
    return kept and any(step["type"] == "ByteLevel" for step in steps)
