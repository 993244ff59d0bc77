"""An answer's tokens as text: whole characters only, and ended by stop strings wherever they fall."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.stop_strings import StopMatcher
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, SamplingParams


class TextUpdate(NamedTuple):
    """What a push added to the answer."""

    text: str
    tokens: int
    """Tokens of this push that belong to the answer: all, or those up to the one that completed a stop string."""
    stop: str | None
    """The stop string that ended the answer. Its tokens count; its text appears only if that was asked for."""


class TextStream:
    """Turns one answer's deltas into text.

    Tokens are taken one at a time where there are stop strings, so the text, the count and the stop do not depend on
    how deltas were cut. A stop string completed within the first min_tokens tokens is ordinary text.

    With `include_stop`, what ended the answer is part of its text: the stop string, or what the EOS or stop token
    reads, which is nothing for a special token that is skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._decoder = tokenizer.new_decoder(skip_special_tokens=skip_special_tokens)
        self._include_stop = include_stop
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._tokens = 0
        self._stop: str | None = None

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> TextUpdate:
        """Take the tokens of one delta; `finish_reason` is the engine's, with the answer's last delta.

        With "stop" the last token is the EOS or stop token, which counts and has no text unless stops are included.
        With any reason, what was held back comes out. After a stop string was met, pushes change nothing.
        """
        if self._stop is not None:
            return TextUpdate("", 0, self._stop)
        spoken = token_ids[:-1] if finish_reason == "stop" and not self._include_stop else token_ids
        if self._matcher is None:
            text = self._decoder.push(spoken)
            if finish_reason is not None:
                text += self._decoder.finish()
            return TextUpdate(text, len(token_ids), None)
        return self._push_matching(self._matcher, token_ids, spoken, final=finish_reason is not None)

    def _push_matching(
        self, matcher: StopMatcher, token_ids: Sequence[int], spoken: Sequence[int], *, final: bool
    ) -> TextUpdate:
        parts = []
        for count, token in enumerate(spoken, 1):
            armed = self._tokens + count > self._min_tokens
            text, self._stop = matcher.feed(self._decoder.push((token,)), armed=armed)
            parts.append(text)
            if self._stop is not None:
                return TextUpdate("".join(parts) + self._stop_text(), count, self._stop)
        self._tokens += len(token_ids)
        if final:
            # Bytes that never became a character turn into U+FFFD here, which a stop string may hold.
            text, self._stop = matcher.feed(self._decoder.finish(), armed=self._tokens > self._min_tokens)
            parts += (text, self._stop_text(), matcher.flush())
        return TextUpdate("".join(parts), len(token_ids), self._stop)

    def _stop_text(self) -> str:
        """What stands where the text was cut in front of a stop string."""
        return self._stop if self._include_stop and self._stop is not None else ""
