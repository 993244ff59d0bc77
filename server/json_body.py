"""Reads a request's body under a limit, and the JSON object in it, strictly."""

import json
from typing import Any

from starlette.requests import Request

from server.errors import ApiError, invalid


async def read_body(request: Request, limit: int) -> bytearray:
    """The whole body. Raises ApiError 413 as soon as it is known to exceed `limit` bytes, 415 for a compressed one.

    Raises starlette's ClientDisconnect if the client goes away before the body is complete.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415, "compressed bodies are not supported; send it without Content-Encoding", code="unsupported_encoding"
        )
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > limit:
            raise _too_large(limit)
        body += part
    return body


def parse_json_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that `body` holds, without its null fields: null means a field's default.

    Stricter than `json.loads`: UTF-8 only, no NaN or Infinity, no key twice in one object, no half of a surrogate pair.
    Raises ApiError 400, with `param` where one field is at fault.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not valid UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"it is not valid JSON: {error.msg}, at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise _malformed("a number in it has too many digits") from None
    if not isinstance(value, dict):
        raise _malformed("it is not a JSON object")
    # Only an escape can make one: raw UTF-8 has none.
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(value)
    return {key: field for key, field in value.items() if field is not None}


def _refuse_constant(name: str) -> None:
    raise _malformed(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _malformed(f"the key {twice[:64]!r} occurs twice in one object")
    return result


def _refuse_surrogates(value: dict[str, Any]) -> None:
    for key, field in value.items():
        try:
            json.dumps({key: field}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid(key, f"{key[:64]} holds half of a surrogate pair, which is not valid Unicode") from None


def _malformed(reason: str) -> ApiError:
    return invalid(None, f"the body cannot be read: {reason}", "invalid_json")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that this server takes", code="body_too_large")
