"""The default model's tokenizer: byte-level BPE, digits apart, id 0 = ``<|endoftext|>`` (end of text and padding)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.corpus import DOCUMENT_END


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of ``vocab_size`` from ``texts``. Lossless: no normaliser, all 256 bytes are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# How often each source is read for the vocabulary: the novels are most of the text, but the model is to write stories.
TEXT_WEIGHTS = {"tinystories": 3.0, "storybooks": 3.0, "fairytaleqa": 2.0, "children": 1.0, "classics": 0.1}


def tokenizer_texts(documents: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Text for ``train_tokenizer``: each source as often as ``TEXT_WEIGHTS`` says, a fraction being its first part."""
    for name, texts in documents.items():
        whole, fraction = divmod(TEXT_WEIGHTS.get(name, 1.0), 1.0)
        for _ in range(int(whole)):
            yield from texts
        yield from texts[: round(len(texts) * fraction)]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; ``max_length`` is the context in tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": DOCUMENT_END,
        "model_max_length": max_length,
        "pad_token": DOCUMENT_END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
