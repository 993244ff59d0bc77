"""Logprobs as a completion tells them: four arrays with an entry a token."""

from collections.abc import Sequence

from engine.tokenizer import Tokenizer
from engine.types import TokenLogprobs
from server.protocol import LogprobsBody, PromptLogprob

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

    def write_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int, offset: int
    ) -> LogprobsBody:
        """A prompt in front of the answer, whose text is `offset` characters long; nothing predicts its first token."""
        told = self.write(token_ids, (None, *(_likeliest(one, top) for one in logprobs)))
        self.begin(offset)
        return told

    def _top(self, token: int, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself behind them if it is none of them."""
        likeliest = zip(one.top_ids, one.top_logprobs, strict=True)
        return {self._name(other): finite(logprob) for other, logprob in likeliest} | {
            self._name(token): finite(one.logprob)
        }


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> list[dict[str, PromptLogprob] | None]:
    """The field of that name: by token id, the likeliest and the token itself; null for the first token."""
    entries: list[dict[str, PromptLogprob] | None] = [None]
    for token, one in zip(token_ids[1:], logprobs, strict=True):
        told = _likeliest(one, top)
        pairs = (*zip(told.top_ids, told.top_logprobs, strict=True), (token, told.logprob))
        entries.append(
            {str(other): PromptLogprob(finite(logprob), tokenizer.token_name(other)) for other, logprob in pairs}
        )
    return entries


def join(first: LogprobsBody, second: LogprobsBody) -> LogprobsBody:
    """One behind the other."""
    return LogprobsBody(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _likeliest(one: TokenLogprobs, top: int) -> TokenLogprobs:
    """With the first so many of the likeliest tokens only."""
    return TokenLogprobs(one.logprob, one.top_ids[:top], one.top_logprobs[:top])


def finite(logprob: float) -> float:
    """The logprob as JSON can say it."""
    return max(logprob, LEAST_LOGPROB)
