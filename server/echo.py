"""Answers that are the prompt alone: `echo` with `max_tokens: 0`."""

from collections.abc import AsyncIterator, Callable, Sequence

from engine.types import Delta, GenerationRequest


class EchoAnswers:
    """Stands in for the engine's answers (`engine.client.Answers`): each ends at once, without a token."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._requests = requests

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """One step that ends all of them."""
        yield [Delta(request_id=request.request_id, finish_reason="length") for request in self._requests]

    def limit_unread(self, steps: int, exceeded: Callable[[], None]) -> None:
        """There is one step."""

    def abort(self, request_ids: Sequence[int] | None = None) -> None:
        """There is nothing to abort."""
