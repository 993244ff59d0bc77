"""Server-sent events, as far as completions need them."""

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks a proxy in front (nginx) to pass chunks on at once.
    (b"x-accel-buffering", b"no"),
]


def event(data: bytes) -> bytes:
    """One event. `data` is JSON, which has no line breaks of its own."""
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")
