"""Errors as clients see them: always `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from engine.client import EngineRejectedError, EngineUnavailableError
from engine.types import InvalidRequestError

RETRY_SOON = "1"
RETRY_LATER = "5"
"""Seconds for Retry-After: a queue moves in the first, another server or a restart takes the second."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of the envelope."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The envelope."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field at fault, where there is one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        # A message may quote the client, who can send half a surrogate pair; the answer has to be UTF-8.
        self.detail = ErrorDetail(message=encodable(message), type=type_, param=param and encodable(param), code=code)

    def body(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(ErrorBody(self.detail))

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body(), self.status, headers=self.headers, media_type="application/json")


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400: what the client sent cannot be served."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str = "unavailable", retry_after: str = RETRY_SOON) -> ApiError:
    """503: not now."""
    return ApiError(503, message, type_="service_unavailable_error", code=code, headers={"Retry-After": retry_after})


def draining() -> ApiError:
    """503: the server is about to stop."""
    return unavailable("the server is shutting down and takes no new requests", "draining", RETRY_LATER)


def queue_full(message: str) -> ApiError:
    """429: as many requests wait already as may wait."""
    return ApiError(429, message, type_="rate_limit_error", code="queue_full", headers={"Retry-After": RETRY_SOON})


def internal(reference: str) -> ApiError:
    """500: our fault. `reference` is the request's id, under which the log tells what happened."""
    message = f"the server failed to answer this request; its log says why under the id {reference}"
    return ApiError(500, message, type_="server_error", code="internal_error")


def generation_failed(message: str, reference: str) -> ApiError:
    """500: the engine ended an answer with an error."""
    return ApiError(500, f"{message} (request {reference})", type_="server_error", code="generation_failed")


def as_api_error(error: BaseException) -> ApiError | None:
    """What a client is told of an exception that it or the engine's state caused; None for faults of our own."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return invalid(error.param, error.message)
        case EngineRejectedError(code="invalid"):
            return invalid(error.param, error.message)
        case EngineRejectedError(code="queue_full"):
            return queue_full(error.message)
        case EngineRejectedError():
            return unavailable(error.message)
        case EngineUnavailableError():
            return unavailable(str(error) or "no engine can take this request now; try again")
    return None


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs escaped, so that it can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
