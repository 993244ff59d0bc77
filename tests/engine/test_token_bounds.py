"""Bounds that hold for every text, or none."""

import pytest
import tokenizers
from hypothesis import given, settings, strategies
from tokenizers import normalizers, pre_tokenizers

from engine.token_bounds import longest_token_bytes
from engine.tokenizer import Tokenizer
from tests.engine.tokenizers_of_tests import CORPUS, END_OF_TEXT, byte_fallback, byte_level

BYTE_LEVEL = Tokenizer(byte_level(), END_OF_TEXT)
SNIPPETS = strategies.sampled_from([*CORPUS, END_OF_TEXT, "two words 漢", " ", "\n\n", "😀"])


@settings(max_examples=200, deadline=None)
@given(strategies.lists(strategies.text(max_size=20) | SNIPPETS, max_size=8).map("".join))
def test_no_text_has_fewer_tokens(text: str) -> None:
    assert BYTE_LEVEL.fewest_tokens(text) <= len(BYTE_LEVEL.encode(text))


def test_a_bound_is_worth_something() -> None:
    assert BYTE_LEVEL.fewest_tokens("x" * 10_000) > 100
    assert BYTE_LEVEL.fewest_tokens("") == 0


def test_a_text_of_the_longest_token_reaches_the_bound() -> None:
    longest = "two words 漢"
    assert BYTE_LEVEL.fewest_tokens(longest * 5) == 5 == len(BYTE_LEVEL.encode(longest * 5))


def test_no_bound_where_text_may_vanish() -> None:
    normalized, stripping, splitting = byte_level(), byte_level(), byte_level()
    normalized.normalizer = normalizers.Strip()
    stripping.add_tokens([tokenizers.AddedToken("<eats>", lstrip=True)])
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitting.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), byte_pieces])
    for tokenizer in (normalized, stripping, splitting, byte_fallback()):
        assert longest_token_bytes(tokenizer) is None
        assert Tokenizer(tokenizer).fewest_tokens("x" * 1000) == 0


@pytest.mark.parametrize("behavior", ["isolated", "merged_with_previous"])
def test_splitting_that_keeps_everything_has_a_bound(behavior: str) -> None:
    tokenizer = byte_level()
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", behavior), byte_pieces])
    assert longest_token_bytes(tokenizer) is not None
