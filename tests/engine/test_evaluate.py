"""Loss and bits per byte, against the training code's own evaluation of the same documents."""

import lzma
from pathlib import Path

import numpy as np
import pytest

from engine.evaluate import DocumentScore, cut_windows, read_documents, table
from engine.llm import LLM
from engine.model_files import find_model
from engine.types import InvalidRequestError
from training.evaluate import bits_per_byte, token_bytes
from training.export import load_model, load_tokenizer

DOCUMENTS = [
    "Once upon a time there was a little girl named Lily. She had a naïve dog 😀.",
    "x",
    "",
    "The sun was hot. " * 450,
    "Tom and Sue went to the park.\n\nThey saw a big bird.",
]


def test_figures_are_those_of_training() -> None:
    directory = find_model(None)
    model, tokenizer = load_model(directory).eval(), load_tokenizer(directory)
    encoded = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16) for text in DOCUMENTS]
    assert len(encoded[3]) > 2048 - 3, "no document is cut"
    llm = LLM(device="cpu", dtype="float32", max_rows=1)
    for u in (3, 0):
        expected = bits_per_byte(model, encoded, token_bytes(tokenizer), u)
        scores = llm.evaluate(DOCUMENTS, padding=u, progress=False)
        for score, (bits, count) in zip(scores, expected, strict=True):
            assert score.bytes == count
            assert score.bits == pytest.approx(bits, rel=1e-4, abs=1e-3)
        assert scores[2].tokens == 0
        assert scores[4].tokens == len(encoded[4]) + 1 - (4 - u)
    assert llm.evaluate(DOCUMENTS[:2], progress=False) == llm.evaluate(DOCUMENTS[:2], padding=3, progress=False)
    with pytest.raises(InvalidRequestError, match="padding"):
        llm.evaluate(DOCUMENTS[:1], padding=4, progress=False)


@pytest.mark.parametrize("compressed", [False, True])
def test_documents_of_a_file(tmp_path: Path, compressed: bool) -> None:
    for text, documents in {
        "one\ntwo\n<e>\nthree\n<e>\n": ["one\ntwo", "three"],
        "one\n<e>\n\n<e>\nopen\n": ["one", "", "open"],
        "only": ["only"],
        "": [],
    }.items():
        path = tmp_path / ("file.txt.xz" if compressed else "file.txt")
        path.write_bytes(lzma.compress(text.encode()) if compressed else text.encode())
        assert read_documents(path, "<e>") == documents


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "bad.xz").write_bytes(b"not xz")
    for name in ("bad.txt", "bad.xz", "missing"):
        with pytest.raises(InvalidRequestError, match=name):
            read_documents(tmp_path / name, "<e>")


def test_windows() -> None:
    assert cut_windows(range(1, 6), 2, 0) == [[1, 2], [3, 4], [5, 0]]
    assert cut_windows([1, 2], 2, 0) == [[1, 2, 0]]
    assert cut_windows([], 2, 0) == []


def test_a_table() -> None:
    scores = [DocumentScore(2, 4, 8.0), DocumentScore(), DocumentScore(6, 12, 8.0)]
    assert list(table("f", scores, each=True)) == [
        "f\t0\t2\t4\t2.7726\t2.0000",
        "f\t1\t0\t0\tnan\tnan",
        "f\t2\t6\t12\t0.9242\t0.6667",
        "f\tall\t8\t16\t1.3863\t1.0000",
    ]
    assert len(list(table("f", scores, each=False))) == 1
