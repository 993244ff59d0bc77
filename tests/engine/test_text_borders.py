"""An answer's text where borders of characters, tokens, deltas and stop strings meet in every way."""

from collections.abc import Iterator, Sequence

import pytest

from engine.text_stream import TextStream
from engine.types import SamplingParams
from tests.engine import borders
from tests.engine.borders import BLOCK, CHARACTERS, Expected


def endings(character: bytes) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Stop strings, and whether they are to be in the text."""
    for stop in borders.stops(character):
        yield stop, False
        if stop:
            yield stop, True


def check(tokens: Sequence[bytes], stop: tuple[str, ...], include: bool) -> None:
    """By token, by block and at once, the answer is as expected; and nothing is held back without need."""
    expected, beginnings = borders.expected(tokens, stop, include=include), borders.beginnings(tokens)
    token_ids = borders.ids(tokens)
    for size in (1, BLOCK, len(tokens)):
        stream = TextStream(borders.tokenizer(), SamplingParams(stop=stop), include_stop=include)
        text, counted, met = "", 0, None
        for start in range(0, len(tokens), size):
            last = start + size >= len(tokens)
            update = stream.push(token_ids[start : start + size], "length" if last else None)
            text, counted, met = text + update.text, counted + update.tokens, update.stop
            if met is not None:
                break
            assert last or text == borders.handed_out(beginnings[counted - 1], stop), (tokens, stop, include, size)
        assert Expected(text, counted, met) == expected, (tokens, stop, include, size)


@pytest.mark.parametrize("character", CHARACTERS, ids=repr)
def test_neither_tokens_nor_deltas_show_in_the_text(character: bytes) -> None:
    """Each way to cut "(C)" into tokens, at each offset, with each stop string."""
    for offset, answer in zip(borders.OFFSETS, borders.answers(character), strict=True):
        front, behind = answer[:offset], answer[-borders.BEHIND :]
        for cut in borders.cuts(answer[offset : -borders.BEHIND]):
            tokens = [*borders.bytewise(front), *cut, *borders.bytewise(behind)]
            for stop, include in endings(character):
                check(tokens, stop, include)


@pytest.mark.parametrize("character", CHARACTERS, ids=repr)
def test_an_answer_may_end_at_any_byte(character: bytes) -> None:
    for answer in borders.answers(character):
        for end in range(1, len(answer) + 1):
            for stop, include in endings(character):
                check(borders.bytewise(answer[:end]), stop, include)
