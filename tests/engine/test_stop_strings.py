import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stop_strings import StopMatcher


def feed_all(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(strings)
    text = ""
    for piece in pieces:
        released, stop = matcher.feed(piece)
        text += released
        if stop is not None:
            return text, stop
    return text + matcher.flush(), None


def first_match(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """The rule, straight: after each piece, the match that starts first; among equals the first of the list."""
    text = ""
    for piece in pieces:
        text += piece
        found = [(text.find(string), place) for place, string in enumerate(strings) if string in text]
        if found:
            start, place = min(found)
            return text[:start], strings[place]
    return text, None


@pytest.mark.parametrize(
    ("strings", "pieces", "expected"),
    [
        (["STOP"], ["a ST", "OP b"], ("a ", "STOP")),
        (["STOP"], ["a ST", "ART"], ("a START", None)),
        (["STOP"], ["STSTOP"], ("ST", "STOP")),
        (["aab"], ["a", "a", "a", "b"], ("a", "aab")),
        (["b", "abc"], ["abc"], ("", "abc")),
        (["b", "abc"], ["ab", "c"], ("a", "b")),
        (["ab", "abc"], ["abc"], ("", "ab")),
        (["abc", "ab"], ["abc"], ("", "abc")),
        (["abab"], ["aba", "cabab"], ("abac", "abab")),
        (["\n\n"], ["a\n", "b\n", "\n"], ("a\nb", "\n\n")),
        (["漢字"], ["漢", "字"], ("", "漢字")),
    ],
)
def test_where_text_is_cut(strings: list[str], pieces: list[str], expected: tuple[str, str | None]) -> None:
    assert feed_all(strings, pieces) == expected == first_match(strings, pieces)


few = st.text(alphabet="ab", min_size=1, max_size=5)


@given(st.lists(few, min_size=1, max_size=4), st.lists(st.text(alphabet="abc", max_size=6), max_size=12))
@settings(max_examples=500)
def test_it_agrees_with_searching_the_whole_text(strings: list[str], pieces: list[str]) -> None:
    assert feed_all(strings, pieces) == first_match(strings, pieces)


@given(st.lists(few, min_size=1, max_size=3), st.text(alphabet="abc", max_size=30))
def test_just_what_may_begin_a_stop_string_is_held_back(strings: list[str], text: str) -> None:
    matcher = StopMatcher(strings)
    released = ""
    for place, character in enumerate(text):
        piece, stop = matcher.feed(character)
        released += piece
        if stop is not None:
            return
        so_far = text[: place + 1]
        held = max((k for s in strings for k in range(len(s)) if so_far.endswith(s[:k])), default=0)
        assert released == so_far[: len(so_far) - held]


def test_a_match_while_not_armed_is_ordinary_text_but_may_begin_another() -> None:
    matcher = StopMatcher(["aa"])
    assert matcher.feed("aa", armed=False) == ("a", None)
    assert matcher.feed("a") == ("", "aa")


def test_long_stop_strings_take_no_more_time_than_the_text() -> None:
    matcher = StopMatcher(["a" * 10_000_000 + str(number) for number in range(16)])
    for _ in range(100):
        assert matcher.feed("aaa") == ("", None)
    assert matcher.flush() == "a" * 300
