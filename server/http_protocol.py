"""uvicorn's HTTP protocol, with what it lacks against clients that hold connections without using them."""

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HANG_UP = "hang_up"


class ClientProtocol(HttpToolsProtocol):
    """One connection. A client that never says anything loses it as early as one that says nothing more."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; the parameter's type is the one that uvicorn declares, narrower than asyncio's."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        # Not `close`, which would wait until the client has taken what is buffered.
        self.scope["state"][_HANG_UP] = self.transport.abort


def hang_up(scope: Scope) -> None:
    """Close the connection of a request at once. Whoever serves it is told, as of a client that left by itself."""
    scope["state"][_HANG_UP]()
