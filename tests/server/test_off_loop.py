import threading

import pytest

from server.off_loop import INLINE_ITEMS, off_loop_if_long


@pytest.mark.parametrize(("items", "here"), [(0, True), (INLINE_ITEMS, True), (INLINE_ITEMS + 1, False)])
async def test_long_work_is_done_in_another_thread(items: int, here: bool) -> None:
    worker = await off_loop_if_long(threading.get_ident, items)
    assert (worker == threading.get_ident()) == here


async def test_an_error_of_the_thread_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        await off_loop_if_long(lambda: 1 // 0, INLINE_ITEMS + 1)
