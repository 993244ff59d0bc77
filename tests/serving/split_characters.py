"""A small model of random weights that writes characters in pieces: its tokens begin and end anywhere inside them."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from engine.detokenizer import byte_level_table
from tests.engine.tokenizers_of_tests import every_part, save

BLOCK = 4
LONGEST_CHARACTER = 4
CHARACTERS = "aé漢😀"
"""Of 1 to 4 bytes. Tokens are the parts of two of them; others come about where tokens of different ones meet."""


def write_model(directory: Path) -> list[bytes]:
    """Make the directory and all of a model but its weights; returns what each token stands for.

    Answers go on in the block that their prompt ends in.
    """
    directory.mkdir()
    tokenizer = every_part((first + second).encode() for first in CHARACTERS for second in CHARACTERS)
    save(tokenizer, directory)
    contents = byte_level_table(tokenizer)
    assert contents is not None
    decoder = {"num_layers": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64}
    config = {
        "model_type": "block_transformer",
        "vocab_size": len(contents),
        "block_length": BLOCK,
        "max_length": 256,
        "prompt_alignment": "forced_tail",
        "embedder": {"hidden_size": 64 // BLOCK},
        "block_decoder": decoder,
        "token_decoder": {**decoder, "prefix_length": 2},
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return contents


def split_pairs(tokens: Sequence[bytes], prompt_length: int) -> list[str]:
    """Two characters of several bytes each, the second of which lies in two blocks: what could end an answer there.

    Only those that the answer has not had before.
    """
    data = b"".join(tokens)
    starts = [0, *accumulate(map(len, tokens))]
    borders = [starts[place] for place in range(1, len(tokens)) if (prompt_length + place) % BLOCK == 0]
    pairs = []
    for border in borders:
        for start in range(max(border - LONGEST_CHARACTER + 1, 0), border):
            for end in range(border + 1, start + LONGEST_CHARACTER + 1):
                for before in range(max(start - LONGEST_CHARACTER, 0), start - 1):
                    pair = data[before:end]
                    if _is_character(data[before:start]) and _is_character(data[start:end]):
                        if data.index(pair) == before:
                            pairs.append(pair.decode())
    return pairs


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False
