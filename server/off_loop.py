"""Work that may take long is left to a thread, so that no other request waits for it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INLINE_ITEMS = 1 << 14
"""Characters to tokenise, or tokens to turn into text, that are not worth a thread."""


async def off_loop_if_long(work: Callable[[], T], items: int) -> T:
    """What `work` returns: done here if it is for few items, else in a thread."""
    return work() if items <= INLINE_ITEMS else await asyncio.to_thread(work)
