"""The answers that one HTTP request asked for, followed from their deltas to text."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from engine.metrics import MetricsRecorder
from engine.text_stream import TextStream
from engine.types import SEED_RANGE, Delta, GenerationRequest, SamplingParams, ScoreRequest, TokenLogprobs, pack_tokens
from server.answer_metrics import AnswerMetrics, PromptTally
from server.logprobs import LogprobsWriter


class Piece(NamedTuple):
    """What a delta, or one token of it, adds to an answer."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens, if they were asked for."""


@dataclass
class PromptScore:
    """What the engine says of a prompt's tokens."""

    request: ScoreRequest
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of all but the first; None as long as they are not there."""


class PreparedPrompt(NamedTuple):
    """A prompt as the engine gets it; `params.seed` is that of its first answer, or None for a random one each."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    echo: str = ""
    """What every answer's text begins with."""


@dataclass
class Choice:
    """One answer under way."""

    index: int
    request: GenerationRequest
    stream: TextStream
    metrics: AnswerMetrics
    logprobs: LogprobsWriter | None = None
    """Where logprobs were asked for."""
    echo: str = ""
    """The prompt's text where it is to come with the first piece, which takes it from here."""
    echo_length: int = 0
    """Characters of `echo`."""
    score: PromptScore | None = None
    """Of its prompt, which other answers may share, where that is asked for. Told with the first piece."""
    held: list[Piece] = field(default_factory=list)
    """Waiting for the prompt's score."""
    pieces: list[Piece] = field(default_factory=list)
    """Kept only where the whole answer is sent at once."""
    tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that the engine had in its prefix cache."""
    begun: bool = False
    """Whether a body of it has gone out."""
    finish_reason: Literal["stop", "length"] | None = None

    def release(self, pieces: list[Piece]) -> list[Piece]:
        """What can go out, now that these pieces have come (or the score has): nothing before the prompt's score."""
        self.held += pieces
        if self.score is not None and self.score.logprobs is None:
            return []
        pieces, self.held = self.held, []
        return pieces

    def take(self, delta: Delta, now: float, *, each_token: bool) -> list[Piece]:
        """The pieces that a delta without an error adds: one, or one a token.

        Nothing follows the piece with the finish_reason, whatever the engine still sends.
        """
        if self.finish_reason is not None:
            return []
        pieces, tokens = [], 0
        for part in _split(delta) if each_token else (delta,):
            update = self.stream.push(part.token_ids, part.finish_reason)
            tokens += update.tokens
            text, token_ids = self.echo + update.text, part.token_ids[: update.tokens]
            self.echo = ""
            if update.stop is not None:
                piece = Piece(text, token_ids, "stop", update.stop)
            elif part.finish_reason == "stop" or part.finish_reason == "length":
                piece = Piece(text, token_ids, part.finish_reason, part.stop_reason)
            else:
                piece = Piece(text, token_ids)
            if part.logprobs:
                piece = piece._replace(logprobs=part.logprobs[: update.tokens])
            pieces.append(piece)
            if piece.finish_reason is not None:
                self.finish_reason = piece.finish_reason
                break
        self.tokens += tokens
        self.cached_tokens += delta.cached_tokens
        self.metrics.delivered(tokens, delta.timing, now)
        if self.finish_reason is not None:
            self.metrics.ended(self.finish_reason, now)
        return pieces


def make_choices(
    prompts: Sequence[PreparedPrompt],
    n: int,
    *,
    priority: int,
    score_top: int | None,
    cache_salt: str = "",
    new_stream: Callable[[SamplingParams], TextStream],
    new_logprobs: Callable[[], LogprobsWriter | None],
    recorder: MetricsRecorder,
    next_request_id: Callable[[], int],
    arrival: float,
) -> list[Choice]:
    """n answers to every prompt, in prompt-major order.

    `score_top` is how many of the likeliest tokens are asked for at each of the prompt's; None for no score.

    Answer i to a prompt has the seed (seed + i) mod 2^63; without a seed each draws its own.
    """
    choices: list[Choice] = []
    for token_ids, params, echo in prompts:
        tally = PromptTally(len(token_ids))
        score: PromptScore | None = None
        if score_top is not None:
            score = PromptScore(ScoreRequest(request_id=next_request_id(), text=pack_tokens(token_ids), top=score_top))
        for number in range(n):
            seed = secrets.randbelow(SEED_RANGE) if params.seed is None else (params.seed + number) % SEED_RANGE
            request = GenerationRequest.of(
                request_id=next_request_id(),
                prompt_token_ids=token_ids,
                # Stop strings are looked for here, so they need not travel to the engine n times.
                params=msgspec.structs.replace(params, seed=seed, stop=()),
                priority=priority,
                cache_salt=cache_salt,
            )
            metrics = AnswerMetrics(recorder, tally, arrival)
            choice = Choice(len(choices), request, new_stream(params), metrics, new_logprobs(), echo, len(echo), score)
            choices.append(choice)
    return choices


def _split(delta: Delta) -> Iterator[Delta]:
    """The delta as one delta a token, of which only the last has the end."""
    for place, token in enumerate(delta.token_ids[:-1]):
        yield Delta(request_id=delta.request_id, token_ids=(token,), logprobs=delta.logprobs[place : place + 1])
    yield msgspec.structs.replace(delta, token_ids=delta.token_ids[-1:], logprobs=delta.logprobs[-1:])
