"""Around every HTTP request: its id, its line in the log, its count, and an answer in the envelope whatever happens."""

import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.metrics import MetricsRecorder
from server.disconnect import ClientGoneError
from server.errors import as_api_error, internal
from server.request_record import RequestRecord, attach_record

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""The status that log and metrics give a request whose client did not wait for an answer; it is never sent."""
UNMATCHED = "other"
"""Stands in labels for paths and methods that are none of ours: no label holds a client's text."""
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
PROBES = frozenset({"/health", "/ready", "/metrics", "/load"})
"""Asked every few seconds by machines; logged at level debug."""


class RequestScope:
    """ASGI middleware; the outermost of the application's own.

    A HEAD request is handled as a GET whose body is not sent.
    """

    def __init__(self, app: ASGIApp, recorder: MetricsRecorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord()
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                record.take_client_id(value.decode("latin-1"))
        inner: Scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        attach_record(inner, record)
        answer = _Answer(record, send, head=scope["method"] == "HEAD")
        try:
            await self._app(inner, receive, answer.send)
        except (ClientGoneError, ClientDisconnect):
            pass
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer and the log the reason
            await _answer_error(error, record, inner, receive, answer)
        finally:
            self._note(scope["method"], inner, record, answer)

    def _note(self, method: str, scope: Scope, record: RequestRecord, answer: "_Answer") -> None:
        handler = getattr(scope.get("route"), "path", UNMATCHED)
        status = answer.status if answer.complete or answer.status >= 400 else CLIENT_GONE
        label = method if method in KNOWN_METHODS else UNMATCHED
        self._recorder.count("http_requests_total", 1, (handler, label, str(status)))
        fields = {
            "id": record.id,
            **({"client_id": record.client_id} if record.client_id is not None else {}),
            "method": method,
            "path": scope["path"],
            "status": status,
            "duration_s": round(time.monotonic() - record.started, 6),
            **record.fields,
        }
        log.log(logging.DEBUG if handler in PROBES else logging.INFO, "request", extra=fields)


class _Answer:
    """What was sent of an answer, on its way out."""

    def __init__(self, record: RequestRecord, send: Send, *, head: bool) -> None:
        self._record = record
        self._send = send
        self._head = head
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        """The `send` of the application inside."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            echoed = (b"x-request-id", self._record.echoed_id.encode("ascii"))
            message = {**message, "headers": [*message.get("headers", ()), echoed]}
        elif message["type"] == "http.response.body":
            if self._head:
                message = {**message, "body": b""}
            await self._send(message)
            self.complete = not message.get("more_body", False)
            return
        await self._send(message)


async def _answer_error(
    error: Exception, record: RequestRecord, scope: Scope, receive: Receive, answer: _Answer
) -> None:
    told = as_api_error(error)
    if told is None:
        log.error("a request failed", exc_info=error, extra={"id": record.id})
        told = internal(record.id)
    record.fields["error"] = told.detail.message[:200]
    if answer.status:
        # Too late for another answer. The server closes a connection whose response is not complete.
        return
    await told.response()(scope, receive, answer.send)
