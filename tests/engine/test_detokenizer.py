import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine.detokenizer import StreamDecoder, byte_level_table
from engine.tokenizer import Tokenizer
from tests.engine.tokenizers_of_tests import CORPUS, END_OF_TEXT, byte_fallback, byte_level

BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()
TABLE = byte_level_table(BYTE_LEVEL) or []
BYTES = {token: TABLE.index(bytes([token])) for token in range(256)}
TOKENIZERS = {"byte_level": BYTE_LEVEL, "byte_fallback": BYTE_FALLBACK}

# Broken UTF-8 is rare in random tokens: draw it on purpose, next to whole characters.
BROKEN = [b"\xff", b"\xe2", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3", b"\x80", b"\xed\xa0\x80", b"\xf5\x80", b"\xc0\xaf"]
byte_runs = st.one_of(st.sampled_from(BROKEN), st.text(min_size=1, max_size=3).map(str.encode), st.binary(max_size=4))


def pieces_of(tokenizer: tokenizers.Tokenizer, token_ids: list[int], *, skip: bool = True) -> list[str]:
    decoder = Tokenizer(tokenizer).new_decoder(skip_special_tokens=skip)
    return [*(decoder.push((token,)) for token in token_ids), decoder.finish()]


@given(st.lists(st.one_of(st.integers(0, len(TABLE) + 3), st.just(0))), st.booleans())
@settings(max_examples=300)
def test_random_ids_decode_as_they_do_at_once(token_ids: list[int], skip: bool) -> None:
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces_of(BYTE_LEVEL, token_ids, skip=skip)) == expected


@given(st.lists(byte_runs).map(b"".join))
@settings(max_examples=300)
def test_broken_bytes_decode_as_they_do_at_once(data: bytes) -> None:
    token_ids = [BYTES[byte] for byte in data]
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert expected == data.decode("utf-8", "replace")
    assert "".join(pieces_of(BYTE_LEVEL, token_ids)) == expected


@pytest.mark.parametrize("character", ["é", "漢", "😀", "e\u0301", "👩‍👩‍👧"])
def test_no_piece_ends_inside_a_character(character: str) -> None:
    token_ids = [BYTES[byte] for byte in f"a{character}b".encode()]
    pieces = pieces_of(BYTE_LEVEL, token_ids)
    assert "".join(pieces) == f"a{character}b"
    assert "\ufffd" not in "".join(pieces)
    # Text comes as early as it can: with the last byte of each character.
    assert len([piece for piece in pieces if piece]) == len(f"a{character}b")


def test_an_incomplete_character_comes_out_at_the_end() -> None:
    pieces = pieces_of(BYTE_LEVEL, [BYTES[ord("a")], *(BYTES[byte] for byte in b"\xf0\x9f\x98")])
    assert pieces == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize("text", CORPUS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_text_comes_back(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text.replace(" ", "▁") if name == "byte_fallback" else text).ids
    assert "".join(pieces_of(tokenizer, token_ids)) == text


def test_special_tokens_have_no_bytes_if_skipped_and_other_added_ones_spell_themselves() -> None:
    assert TABLE[0] == b""
    assert (byte_level_table(BYTE_LEVEL, skip_special_tokens=False) or [])[0] == END_OF_TEXT.encode()
    assert TABLE[-1] == "two words 漢".encode()
    assert sorted(BYTES.values()) == sorted(set(BYTES.values()))


def test_other_vocabularies_have_no_byte_table() -> None:
    assert byte_level_table(BYTE_FALLBACK) is None
    assert byte_level_table(tokenizers.Tokenizer(models.BPE())) is None
    assert isinstance(Tokenizer(BYTE_FALLBACK).new_decoder(), StreamDecoder)


@given(st.text())
@settings(max_examples=300)
def test_other_vocabularies_decode_any_text_as_they_do_at_once(text: str) -> None:
    token_ids = BYTE_FALLBACK.encode(text).ids
    expected = BYTE_FALLBACK.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces_of(BYTE_FALLBACK, token_ids)) == expected


@given(st.lists(st.one_of(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), st.just(0))), st.booleans())
@settings(max_examples=300)
def test_other_vocabularies_lose_nothing_to_broken_bytes(token_ids: list[int], skip: bool) -> None:
    expected = BYTE_FALLBACK.decode(token_ids, skip_special_tokens=skip)
    pieces = pieces_of(BYTE_FALLBACK, token_ids, skip=skip)
    handed_out = sum(map(len, pieces[:-1]))
    assert pieces[-1] == expected[handed_out:]


def test_a_stream_that_refuses_to_go_on_is_made_up_for_at_the_end() -> None:
    # This decoder takes back text: a second token erases the space that the first had, and the stream raises.
    tokenizer = tokenizers.Tokenizer(models.BPE({"ab": 0, "c": 1}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("abc", "xyz!")])
    assert "".join(pieces_of(tokenizer, [0, 1, 1])).endswith("!c")
