"""Finding stop strings in text that comes piece by piece, without handing out a character that may belong to one."""

from collections.abc import Sequence


class StopMatcher:
    """Watches one answer's text for any of `strings`."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._patterns = [_Pattern(string) for string in strings]
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Take the next piece of text; return what can be handed out, and the stop string that the piece completes.

        Text that may be the start of a stop string is held back. Where the piece completes several, the one that starts
        first ends the text, and among those the first of the list; the text is cut in front of it. A matcher that is
        not armed lets stop strings that this piece completes pass.
        """
        ends = [pattern.advance(text, armed=armed) for pattern in self._patterns]
        window = self._held + text
        found = [
            (len(self._held) + end - len(pattern.string), place)
            for place, (pattern, end) in enumerate(zip(self._patterns, ends, strict=True))
            if end is not None
        ]
        if found:
            start, place = min(found)
            self._held = ""
            return window[:start], self._patterns[place].string
        cut = len(window) - max((pattern.matched for pattern in self._patterns), default=0)
        self._held = window[cut:]
        return window[:cut], None

    def flush(self) -> str:
        """What is held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string, and how much of it the end of the text so far matches (Knuth, Morris and Pratt's automaton).

    The table of borders grows only as far as the text has matched: a long stop string costs nothing by itself.
    """

    __slots__ = ("_borders", "matched", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        """The longest start of the string, short of the whole, that the text ends with."""
        self._borders = [0, 0]

    def advance(self, text: str, *, armed: bool) -> int | None:
        """Go through `text`; return where in it the first match ends, if `armed`. A match ends the pattern's use."""
        string = self.string
        if not self.matched and string[0] not in text:
            return None
        matched = self.matched
        for place, character in enumerate(text):
            while matched and string[matched] != character:
                matched = self._border(matched)
            if string[matched] == character:
                matched += 1
            if matched == len(string):
                if armed:
                    return place + 1
                matched = self._border(matched)
        self.matched = matched
        return None

    def _border(self, length: int) -> int:
        """The longest proper start of string[:length] that it also ends with."""
        string, borders = self.string, self._borders
        while len(borders) <= length:
            last = string[len(borders) - 1]
            border = borders[-1]
            while border and string[border] != last:
                border = borders[border]
            borders.append(border + (string[border] == last))
        return borders[length]
