"""The engine as a front end sees it: what can be asked of it, and the two ways it says no.

`engine.socket_client` is the client of a running server; tests of the front end bring a fake of the same shape.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from engine.types import Delta, EngineInfo, EngineLoad, GenerationRequest, RejectCode, ScoreRequest


class EngineRejectedError(Exception):
    """The engine took nothing of a group. `param` names the field at fault where `code` is "invalid"."""

    def __init__(self, code: RejectCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code: RejectCode = code
        self.message = message
        self.param = param


class EngineUnavailableError(Exception):
    """No engine is up, or the one that had the request died."""


class Answers(Protocol):
    """The open answers of one accepted group."""

    def deltas(self) -> AsyncIterator[list[Delta]]:
        """What the engine delivers for any request of the group, step by step; ends when all have ended.

        Raises EngineUnavailableError if the engine dies first.
        """
        ...

    def limit_unread(self, steps: int, exceeded: Callable[[], None]) -> None:
        """Call `exceeded`, once, if more than `steps` steps have been waiting in `deltas` for a second."""
        ...

    def abort(self, request_ids: Sequence[int] | None = None) -> None:
        """Make the engine forget these requests (None: all open ones). Their deltas stop at once; may be repeated."""
        ...


class EngineClient(Protocol):
    """Whoever hands requests to engines."""

    @property
    def info(self) -> EngineInfo | None:
        """What is served; None until the first engine is up."""
        ...

    @property
    def up(self) -> bool:
        """Whether there is an engine that a group could be handed to now."""
        ...

    @property
    def load(self) -> EngineLoad:
        """How busy the engines are, added up, as they last said."""
        ...

    def next_request_id(self) -> int:
        """An id that no other open request of this client has."""
        ...

    async def submit(self, requests: Sequence[GenerationRequest], scores: Sequence[ScoreRequest] = ()) -> Answers:
        """Hand over a group, which is taken whole or not at all. A score has one delta, which ends it.

        Raises EngineRejectedError or EngineUnavailableError. Cancelled, it leaves nothing of the group at the engine.
        """
        ...
