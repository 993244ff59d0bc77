"""Logprobs as a completion tells them: four arrays with an entry a token."""

from collections.abc import Sequence

from engine.tokenizer import Tokenizer
from engine.types import TokenLogprobs
from server.protocol import LogprobsBody

LEAST_LOGPROB = -9999.0
"""Stands for -inf, which JSON has not."""


class LogprobsWriter:
    """Follows one answer. What it writes for pieces of it, joined, is what it writes for the whole."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._name = tokenizer.token_name
        self.begin(0)

    def begin(self, offset: int) -> None:
        """What comes next begins so many characters behind the start of the answer's text."""
        self._offset = offset
        self._decoder = self._tokenizer.new_decoder(skip_special_tokens=self._skip_special_tokens)

    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> LogprobsBody:
        """The next tokens; None for one that nothing predicts.

        A token's offset is how many characters are complete in front of it: tokens that share a character have one.
        """
        offsets = []
        for token in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push((token,)))
        return LogprobsBody(
            tokens=[self._name(token) for token in token_ids],
            token_logprobs=[None if one is None else finite(one.logprob) for one in logprobs],
            top_logprobs=[
                None if one is None else self._top(token, one) for token, one in zip(token_ids, logprobs, strict=True)
            ],
            text_offset=offsets,
        )

    def _top(self, token: int, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself behind them if it is none of them."""
        likeliest = zip(one.top_ids, one.top_logprobs, strict=True)
        return {self._name(other): finite(logprob) for other, logprob in likeliest} | {
            self._name(token): finite(one.logprob)
        }


def finite(logprob: float) -> float:
    """The logprob as JSON can say it."""
    return max(logprob, LEAST_LOGPROB)
