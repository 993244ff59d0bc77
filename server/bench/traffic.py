"""Requests as a load tester makes them: lengths, prompts, moments of arrival. All of it follows from a seed."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from server.bench.messages import Lengths, Prompt

LONGEST = 4
"""Times the mean, at which log-normal lengths are cut."""
WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "for", "was", "with", "be", "by", "on", "not", "he", "his", "but"),
    *("at", "are", "this", "have", "from", "had", "they", "which", "one", "you", "were", "all", "her", "she", "there"),
    *("would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if", "out", "so", "up"),
    *("time", "could", "these", "two", "may", "first", "then", "do", "any", "like", "my", "now", "over", "such", "man"),
)


class TrafficError(ValueError):
    """A length or a file of prompts that cannot be used. The message says why."""


def parse_lengths(text: str) -> Lengths:
    """The lengths of a flag: 128, 64-256 (any between), or 128~0.5 (log-normal, sigma 0.5). Raises TrafficError."""
    try:
        if "~" in text:
            mean, sigma = text.split("~")
            lengths = Lengths(kind="lognormal", mean=int(mean), sigma=float(sigma))
        elif "-" in text:
            low, high = text.split("-")
            lengths = Lengths(kind="uniform", low=int(low), high=int(high))
        else:
            lengths = Lengths(kind="fixed", mean=int(text))
    except ValueError:
        raise TrafficError(f"{text} is no number of tokens, like 128, 64-256 or 128~0.5") from None
    bounds = (lengths.low, lengths.high) if lengths.kind == "uniform" else (lengths.mean, lengths.mean)
    if not 1 <= bounds[0] <= bounds[1] <= 1 << 24 or not 0 <= lengths.sigma <= 3:
        raise TrafficError(f"{text}: lengths are from 1 to {1 << 24}, the shorter first, and sigma is from 0 to 3")
    return lengths


def draw(lengths: Lengths, rng: random.Random) -> int:
    """One length."""
    if lengths.kind == "fixed":
        return lengths.mean
    if lengths.kind == "uniform":
        return rng.randint(lengths.low, lengths.high)
    # The mean of exp(N(mu, sigma^2)) is exp(mu + sigma^2 / 2).
    drawn = lengths.mean * rng.lognormvariate(-(lengths.sigma**2) / 2, lengths.sigma)
    return min(max(round(drawn), 1), LONGEST * lengths.mean)


def arrivals(rate: float, rng: random.Random) -> Iterator[float]:
    """Moments of a Poisson process of `rate` a second, in seconds from its start, without end."""
    moment = 0.0
    while True:
        moment += rng.expovariate(rate)
        yield moment


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: a JSON object a line with `prompt` and, if given, `max_tokens` (.jsonl), or a text a line.

    Raises TrafficError.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrafficError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if path.suffix == ".jsonl":
        prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1)]
    else:
        prompts = [Prompt(line) for line in lines]
    if not prompts:
        raise TrafficError(f"{path} holds no prompt")
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        fields = json.loads(line)
        return msgspec.convert({"text": fields["prompt"], "max_tokens": fields.get("max_tokens")}, Prompt)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TrafficError(
            f'{path}: line {number} is no object with "prompt" (a text, or token ids) and a whole "max_tokens", if any'
        ) from None


class Traffic:
    """The bodies of requests, one after the other."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_lengths: Lengths,
        output_lengths: Lengths,
        *,
        vocab_size: int,
        words: bool,
        rng: random.Random,
    ) -> None:
        """`prompts` in turn, from a random one on; without any, random token ids below `vocab_size`, or words."""
        self._prompts = prompts
        self._place = rng.randrange(len(prompts)) if prompts else 0
        self._prompt_lengths = prompt_lengths
        self._output_lengths = output_lengths
        self._ids = range(1, vocab_size)
        self._words = words
        self._rng = rng

    def next(self) -> tuple[str | list[int], int]:
        """A prompt, and the tokens of its answer."""
        if self._prompts:
            prompt = self._prompts[self._place]
            self._place = (self._place + 1) % len(self._prompts)
            return prompt.text, prompt.max_tokens or draw(self._output_lengths, self._rng)
        length = draw(self._prompt_lengths, self._rng)
        text: str | list[int]
        if self._words:
            text = " ".join(self._rng.choices(WORDS, k=length))
        else:
            text = self._rng.choices(self._ids, k=length)
        return text, draw(self._output_lengths, self._rng)
