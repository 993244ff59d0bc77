import lzma
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest

from training.corpus import (
    EOS_ID,
    PAD,
    Mixer,
    Source,
    WindowOptions,
    build_stream,
    lay_out,
    load_sources,
    read_documents,
    save_sources,
    window_starts,
    windows,
)


def make_source(lengths: list[int]) -> Source:
    """Document d holds the ids d * 100 + 1, d * 100 + 2, ..."""
    ids = [d * 100 + 1 + k for d, length in enumerate(lengths) for k in range(length)]
    return Source(np.array(ids, dtype=np.uint16), np.array(lengths, dtype=np.int64))


def test_documents_end_at_the_closing_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(b"One.\n\nTwo \xe2\x80\x9d.\n<|endoftext|>\nThree.\n<|endoftext|>\n"))
    assert read_documents(path) == ["One.\n\nTwo ”.", "Three."]
    path.write_bytes(lzma.compress(b"One.\n<|endoftext|>\nThree."))
    with pytest.raises(ValueError, match="not closed"):
        read_documents(path)


def test_a_document_alone() -> None:
    blocks = lay_out(np.array([7, 8, 9, 10], dtype=np.uint16), 3, 4)
    assert blocks.tolist() == [[PAD, PAD, PAD, 7], [8, 9, 10, EOS_ID]]
    assert lay_out(np.array([7], dtype=np.uint16), 3, 4).tolist() == [[PAD, PAD, PAD, 7], [EOS_ID, PAD, PAD, PAD]]


def test_a_stream_holds_every_document_once_padded_and_closed() -> None:
    source = make_source([1, 4, 7, 12, 3])
    seen_padding = set()
    for seed in range(10):
        blocks, starts = build_stream(source, np.random.default_rng(seed), 4)
        found = []
        for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
            flat = blocks[start:end].ravel()
            real = np.flatnonzero(flat != PAD)
            assert real[0] < 4 and len(flat) - real[-1] <= 4, "no block is all padding"
            assert (np.diff(real) == 1).all() and flat[real[-1]] == EOS_ID
            seen_padding.add(int(real[0]))
            found.append(flat[real[:-1]].tolist())
        assert sorted(found) == sorted(document.tolist() for document in source.documents())
    assert seen_padding == {0, 1, 2, 3}


def test_windows_move_to_document_starts() -> None:
    rng = np.random.default_rng(0)
    starts = np.arange(0, 1000, 7)
    moved = window_starts(1000, starts, WindowOptions(20, start_share=1.0), rng)
    assert set(moved) <= set(starts)
    tiled = window_starts(1000, starts, WindowOptions(20, start_share=0.0), rng)
    assert set(np.diff(np.sort(tiled))) == {20}
    assert max(moved.max(), tiled.max()) <= 980


def test_windows_may_begin_with_a_block_of_eos() -> None:
    options = WindowOptions(8, start_share=1.0, eos_share=1.0)
    found = list(islice(windows(make_source([9, 11, 5, 30]), options, np.random.default_rng(1)), 50))
    assert {window.shape for window in found} == {(8, 4)}
    # No document may start near a window cut: those windows stay where they are.
    begun = [window for window in found if window[0].tolist() == [EOS_ID] * 4]
    assert len(begun) > 25
    assert all(window[1][window[1] != PAD][0] % 100 == 1 for window in begun), "a document starts in block 1"


def test_sources_split_and_round_trip(tmp_path: Path) -> None:
    source = make_source([3, 5, 2, 4])
    early, late = source.split(0.25)
    assert early.lengths.tolist() == [3, 5, 2] and late.ids.tolist() == [301, 302, 303, 304]
    save_sources(tmp_path / "tokens.npz", {"a": early, "b": late})
    again = load_sources(tmp_path / "tokens.npz")
    assert list(again) == ["a", "b"]
    assert again["a"].ids.tolist() == early.ids.tolist() and again["b"].lengths.tolist() == [4]


def test_the_mixer_follows_the_weights() -> None:
    first, second = (np.full((1, 4), value, dtype=np.int16) for value in (1, 2))
    mixer = Mixer({"a": repeat(first), "b": repeat(second)}, np.random.default_rng(0))
    batch = mixer.batch(1000, {"a": 3.0, "b": 1.0})
    assert batch.shape == (1000, 1, 4)
    assert 700 < int((batch[:, 0, 0] == 1).sum()) < 800
    assert set(mixer.batch(10, {"b": 1.0})[:, 0, 0].tolist()) == {2}
