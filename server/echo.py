"""Answers that are the prompt alone: `echo` with `max_tokens: 0`. The engine has at most a part in their logprobs."""

from collections.abc import AsyncIterator, Callable, Sequence

from engine.client import Answers
from engine.types import Delta, GenerationRequest


class EchoAnswers:
    """Stands in for the engine's answers (`engine.client.Answers`): each ends at once, without a token."""

    def __init__(self, requests: Sequence[GenerationRequest], scores: Answers | None = None) -> None:
        """`scores`: what the engine has to say of the prompts, which comes behind."""
        self._requests = requests
        self._scores = scores

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """One step that ends all of them, and then the scores'."""
        yield [Delta(request_id=request.request_id, finish_reason="length") for request in self._requests]
        if self._scores is not None:
            async for step in self._scores.deltas():
                yield step

    def limit_unread(self, steps: int, exceeded: Callable[[], None]) -> None:
        """There is one step."""

    def abort(self, request_ids: Sequence[int] | None = None) -> None:
        """Only the scores can be aborted."""
        if self._scores is not None:
            self._scores.abort(request_ids)
