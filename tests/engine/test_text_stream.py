import codecs
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import byte_level_table
from engine.text_stream import TextStream, TextUpdate
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, SamplingParams
from tests.engine.tokenizers_of_tests import CORPUS, END_OF_TEXT, byte_level

TOKENIZER = Tokenizer(byte_level())
TABLE = byte_level_table(byte_level()) or []
TABLE_WITH_SPECIAL = byte_level_table(byte_level(), skip_special_tokens=False) or []
EOS = 0


def byte_tokens(text: str | bytes) -> list[int]:
    """One token a byte: every border inside a character is a token border."""
    data = text.encode() if isinstance(text, str) else text
    return [TABLE.index(bytes([byte])) for byte in data]


def run(
    params: SamplingParams,
    chunks: Sequence[Sequence[int]],
    reason: FinishReason | None,
    *,
    include_stop: bool = False,
    skip: bool = True,
) -> TextUpdate:
    """All chunks, the last with `reason`: joined text, counted tokens, stop."""
    stream = TextStream(TOKENIZER, params, include_stop=include_stop, skip_special_tokens=skip)
    updates = [stream.push(chunk, reason if place == len(chunks) - 1 else None) for place, chunk in enumerate(chunks)]
    return TextUpdate("".join(u.text for u in updates), sum(u.tokens for u in updates), updates[-1].stop)


def cut_at(token_ids: list[int], cuts: set[int]) -> list[list[int]]:
    borders = [0, *sorted(cut for cut in cuts if 0 < cut < len(token_ids)), len(token_ids)]
    return [token_ids[start:end] for start, end in pairwise(borders)]


def text_so_far(token_ids: list[int], table: list[bytes]) -> str:
    """The text of an answer that goes on: bytes that may still become a character are not text yet."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(table[token] for token in token_ids))


def expected_update(
    params: SamplingParams, token_ids: list[int], reason: FinishReason | None, *, include_stop: bool, skip: bool
) -> TextUpdate:
    """The rules straight from the text of ever longer beginnings of the answer."""
    table = TABLE if skip else TABLE_WITH_SPECIAL
    spoken = token_ids[:-1] if reason == "stop" and not include_stop else token_ids
    whole = TOKENIZER.decode(spoken, skip_special_tokens=skip)
    beginnings = [(text_so_far(spoken[:count], table), count) for count in range(1, len(spoken) + 1)]
    # Stop strings that end within the text of the first min_tokens tokens are ignored.
    ignored_end = len(text_so_far(spoken[: params.min_tokens], table))
    for text, tokens in [*beginnings, (whole, len(token_ids))]:
        if tokens > params.min_tokens:
            starts = [find_ending_after(text, string, ignored_end) for string in params.stop]
            found = [(start, place) for place, start in enumerate(starts) if start >= 0]
            if found:
                start, place = min(found)
                stop = params.stop[place]
                return TextUpdate(text[:start] + (stop if include_stop else ""), tokens, stop)
    return TextUpdate(whole, len(token_ids), None)


def find_ending_after(text: str, string: str, end: int) -> int:
    """Where `string` starts first, of its occurrences that end after `end` characters; -1 if nowhere."""
    return text.find(string, max(end - len(string) + 1, 0))


@pytest.mark.parametrize("text", CORPUS)
@pytest.mark.parametrize("size", [1, 2, 4, 1000])
def test_text_comes_back_whatever_the_chunks(text: str, size: int) -> None:
    token_ids = TOKENIZER.encode(text)
    chunks = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    assert run(SamplingParams(), chunks, "length") == TextUpdate(text, len(token_ids), None)


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_token_that_ended_an_answer_counts_and_has_no_text(stop: tuple[str, ...]) -> None:
    token_ids = [*TOKENIZER.encode("a fox"), *TOKENIZER.encode("!")]
    assert run(SamplingParams(stop=stop), [token_ids], "stop") == TextUpdate("a fox", len(token_ids), None)
    assert run(SamplingParams(stop=stop), [token_ids], "length") == TextUpdate("a fox!", len(token_ids), None)


@pytest.mark.parametrize("character", ["é", "漢", "😀", "e\u0301", "🇩🇪"])
@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_half_a_character_is_never_text(character: str, stop: tuple[str, ...]) -> None:
    stream = TextStream(TOKENIZER, SamplingParams(stop=stop))
    texts = [stream.push([token], None).text for token in byte_tokens(character)]
    assert "".join(texts) == character and all("\ufffd" not in text for text in texts)


@pytest.mark.parametrize("stop", [(), ("zzz",)])
@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_half_a_character_at_the_end_is_flushed(stop: tuple[str, ...], reason: FinishReason) -> None:
    token_ids = byte_tokens("a😀")[:-1]
    assert run(SamplingParams(stop=stop), [token_ids], reason) == TextUpdate("a\ufffd", 4, None)


def test_an_end_without_tokens_flushes_what_was_held_back() -> None:
    stream = TextStream(TOKENIZER, SamplingParams(stop=("STOP",)))
    assert stream.push(byte_tokens("a ST"), None) == TextUpdate("a ", 4, None)
    assert stream.push((), "error") == TextUpdate("ST", 0, None)


def test_a_stop_string_across_chunks_cuts_text_and_tokens() -> None:
    stream = TextStream(TOKENIZER, SamplingParams(stop=("STOP",)))
    assert stream.push(byte_tokens("say ST"), None) == TextUpdate("say ", 6, None)
    assert stream.push(byte_tokens("OP it"), None) == TextUpdate("", 2, "STOP")
    assert stream.push(byte_tokens("more"), "length") == TextUpdate("", 0, "STOP")


def test_a_token_that_completes_a_stop_string_in_its_middle_counts() -> None:
    token_ids = TOKENIZER.encode(" hello")
    assert len(token_ids) == 1
    assert run(SamplingParams(stop=("he",)), [[*byte_tokens("a"), *token_ids, *token_ids]], None) == TextUpdate(
        "a ", 2, "he"
    )


def test_a_stop_string_of_replacement_characters_can_be_completed_by_the_end() -> None:
    token_ids = byte_tokens(b"a\xf0\x9f")
    assert run(SamplingParams(stop=("\ufffd",)), [token_ids], "length") == TextUpdate("a", 3, "\ufffd")
    params = SamplingParams(stop=("\ufffd",), min_tokens=3)
    assert run(params, [token_ids], "length") == TextUpdate("a\ufffd", 3, None)


@pytest.mark.parametrize(
    ("min_tokens", "text", "tokens"), [(0, "", 2), (1, "", 2), (2, "ab", 4), (3, "ab", 4), (4, "abab", 6)]
)
def test_stop_strings_within_min_tokens_are_text(min_tokens: int, text: str, tokens: int) -> None:
    params = SamplingParams(stop=("ab",), min_tokens=min_tokens)
    assert run(params, [byte_tokens("ababab")], None) == TextUpdate(text, tokens, "ab")


def test_a_stop_that_is_included_stands_where_it_was_found() -> None:
    token_ids = [*byte_tokens("say STO"), *byte_tokens("P it")]
    params = SamplingParams(stop=("STOP", "OP i"))
    for size in (1, 3, 100):
        chunks = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
        assert run(params, chunks, "length", include_stop=True) == TextUpdate("say STOP", 8, "STOP")


def test_a_stop_completed_by_the_end_is_included_too() -> None:
    token_ids = byte_tokens(b"a\xf0\x9f")
    params = SamplingParams(stop=("\ufffd",))
    assert run(params, [token_ids], "length", include_stop=True) == TextUpdate("a\ufffd", 3, "\ufffd")


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_the_token_that_ended_an_answer_is_text_where_stops_are_included(stop: tuple[str, ...]) -> None:
    params = SamplingParams(stop=stop)
    token_ids = [*TOKENIZER.encode("a"), EOS]
    assert run(params, [token_ids], "stop", include_stop=True) == TextUpdate("a", 2, None)
    kept = run(params, [token_ids], "stop", include_stop=True, skip=False)
    assert kept == TextUpdate(f"a{END_OF_TEXT}", 2, None)


alphabets = st.text(alphabet="abé漢😀", max_size=12).map(byte_tokens)
broken = st.sampled_from([b"\xff", b"\xe2\x82", b"\xf0\x9f", b"\x80"]).map(byte_tokens)
pieces = st.one_of(alphabets, broken, st.lists(st.integers(0, 319), max_size=4), st.just([EOS]))
answers = st.lists(pieces, max_size=5).map(lambda parts: [token for part in parts for token in part])
stops = st.lists(st.text(alphabet="abé漢😀\ufffd<|>", min_size=1, max_size=3), max_size=3).map(tuple)
reasons: st.SearchStrategy[FinishReason] = st.sampled_from(["stop", "length", "abort"])


@given(answers, stops, st.integers(0, 8), reasons, st.sets(st.integers(1, 60)), st.booleans(), st.booleans())
@settings(max_examples=800)
def test_any_cut_gives_what_the_rules_say(
    token_ids: list[int],
    stop: tuple[str, ...],
    min_tokens: int,
    reason: FinishReason,
    cuts: set[int],
    include_stop: bool,
    skip: bool,
) -> None:
    if reason == "stop":
        token_ids = [*token_ids, EOS]
    params = SamplingParams(stop=stop, min_tokens=min_tokens)
    whole = run(params, [token_ids], reason, include_stop=include_stop, skip=skip)
    assert run(params, cut_at(token_ids, cuts), reason, include_stop=include_stop, skip=skip) == whole
    assert whole == expected_update(params, token_ids, reason, include_stop=include_stop, skip=skip)
