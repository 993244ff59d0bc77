"""Tokenizers that tests train in a moment, saved as a model directory would hold them."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
CORPUS = [
    "Once upon a time there was a little fox. The fox said hello, hello!",
    "Smörgåsbord, naïve café; e\u0301 combines. 漢字かな交じり文 한국어 😀👩‍👩‍👧 🇩🇪",
    "The end. STOP stop\n\nUser: 1 2 3",
]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE of 320 tokens: id 0 ends a text, the last one has characters that its alphabet lacks."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=319,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens(["two words 漢"])
    return tokenizer


def every_part(texts: Iterable[bytes], longest: int = 1000) -> tokenizers.Tokenizer:
    """Byte-level: every part of these texts of up to `longest` bytes is a token, wherever in a character it is cut.

    Id 0 ends a text. A text is encoded as a token a byte: nothing says which tokens make which.
    """
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Has every byte that UTF-8 has, and is spelled with a character for each.
    sample = "".join(
        chr(code) for code in (*range(0x800), *range(0x800, 0xD800, 0x1000), *range(1 << 16, 17 << 16, 1 << 16))
    )
    spelled = "".join(piece for piece, _ in spell.pre_tokenize_str(sample))
    spelling = dict(zip(sample.encode(), spelled, strict=True))
    parts: dict[str, None] = {}
    for text in texts:
        word = "".join(spelling[byte] for byte in text)
        for start in range(len(word)):
            parts |= dict.fromkeys(word[start:end] for end in range(start + 1, min(start + longest, len(word)) + 1))
    vocabulary = {part: token for token, part in enumerate([END_OF_TEXT, *parts])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = spell
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Not byte-level: pieces of words, and tokens <0x00>..<0xFF> for what they cannot spell."""
    pieces = [END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁fox", "x", "漢", "é"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}), encoding="utf-8")
