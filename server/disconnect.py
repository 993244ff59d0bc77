"""Work for a client ends when the client goes away."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Message, Receive, Send


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


async def unless_disconnected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run `work`, which answers a request whose body has been read, and cancel it at once if the client goes away.

    Raises what `work` raises, or ClientGoneError once `work` has cleaned up after its cancellation.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if working.cancelled():
        raise ClientGoneError
    working.result()


def noticing(send: Send) -> Send:
    """`send`, raising ClientGoneError where the server finds the connection closed."""

    async def send_or_notice(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise ClientGoneError from error

    return send_or_notice


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
