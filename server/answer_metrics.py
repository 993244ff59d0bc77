"""What is counted of each answer. One place, so that the figures agree with each other.

The end of every request (one answer) that got tokens is observed exactly once, however it ended: on an idle server the
counts of time_to_first_token, request_latency, request_decode and request_generation_tokens are equal. Requests that
ended without any token are in requests_total only.
"""

from dataclasses import dataclass
from typing import Literal

from engine.metrics import MetricsRecorder
from engine.types import Timing

Outcome = Literal["stop", "length", "abort", "error", "rejected"]


@dataclass
class PromptTally:
    """A prompt that several answers share. Its tokens are counted once, as in a response's usage."""

    tokens: int
    counted: bool = False


class AnswerMetrics:
    """Counts one answer from its arrival. Times are seconds of one monotonic clock."""

    def __init__(self, recorder: MetricsRecorder, prompt: PromptTally, arrival: float) -> None:
        self._recorder = recorder
        self._prompt = prompt
        self._arrival = arrival
        self._first = arrival
        self._last = arrival
        self._first_tokens = 0
        self._tokens = 0
        self._ended = False

    @property
    def seconds_to_first_token(self) -> float | None:
        """None before the first tokens."""
        return self._first - self._arrival if self._tokens else None

    def delivered(self, tokens: int, timing: Timing | None, now: float) -> None:
        """`tokens` more are handed on; `timing` comes with the first ones."""
        if tokens < 1 or self._ended:
            return
        self._recorder.count("generation_tokens_total", tokens)
        if not self._tokens:
            self._first_delivery(tokens, timing, now)
        else:
            self._recorder.observe("inter_token_latency_seconds", (now - self._last) / tokens)
        self._tokens += tokens
        self._last = now

    def ended(self, outcome: Outcome, now: float) -> None:
        """The answer is over. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._recorder.count("requests_total", 1, (outcome,))
        if not self._tokens:
            return
        self._recorder.observe("request_latency_seconds", now - self._arrival)
        self._recorder.observe("request_decode_seconds", self._last - self._first)
        self._recorder.observe("request_prompt_tokens", self._prompt.tokens)
        self._recorder.observe("request_generation_tokens", self._tokens)
        if later := self._tokens - self._first_tokens:
            self._recorder.observe("time_per_output_token_seconds", (self._last - self._first) / later)

    def _first_delivery(self, tokens: int, timing: Timing | None, now: float) -> None:
        self._first, self._first_tokens = now, tokens
        self._recorder.observe("time_to_first_token_seconds", now - self._arrival)
        if timing is not None:
            self._recorder.observe("request_queue_seconds", timing.queue)
            self._recorder.observe("request_prefill_seconds", timing.prefill)
        if not self._prompt.counted:
            self._prompt.counted = True
            self._recorder.count("prompt_tokens_total", self._prompt.tokens)
