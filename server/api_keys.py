"""API keys: which requests need one, and whether one that came is among those that the operator gave.

Every path needs a key but those listed as open. That is decided on the bytes of the request's target as they came, so
no spelling of a path that the router would understand otherwise gets by.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

PROBE_PATHS = frozenset({b"/health", b"/ready"})
METRICS_PATH = b"/metrics"

KEY_RULE = "a key has to be of visible ASCII characters, without commas"
_KEY = re.compile(r"[!-+\--~]+")
_BEARER = re.compile(rb"bearer +([!-~]+)", re.IGNORECASE)


def check_key(key: str) -> str:
    """The key. Raises ValueError, which does not quote it, for a text that cannot be one."""
    if not _KEY.fullmatch(key):
        raise ValueError(KEY_RULE)
    return key


def read_key_file(path: Path) -> list[str]:
    """The keys in a file: one a line; blank lines and those that begin with # say nothing.

    Raises OSError, or ValueError that quotes nothing of the file: it is not text, a line is no key, or there is none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            try:
                keys.append(check_key(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not keys:
        raise ValueError("it holds no key")
    return keys


class ApiKeyGuard:
    """ASGI middleware: raises ApiError 401 for a request that needs a key and has none of `keys`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[bytes]) -> None:
        self._app = app
        # Digests are all of one length, so comparing them tells nothing of how long a key is either.
        self._digests = [_digest(key.encode("ascii")) for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] == "http" and scope.get("raw_path") not in self._open_paths:
            self._demand_key(scope)
        await self._app(scope, receive, send)

    def _demand_key(self, scope: Scope) -> None:
        given = list(_authorizations(scope))
        if not given:
            raise _refused("this server needs an API key: send it as `Authorization: Bearer KEY`", "missing_api_key")
        bearer = _BEARER.fullmatch(given[0])
        # Which of two headers a proxy in front looked at cannot be known.
        if len(given) > 1 or bearer is None or not self._is_known(bearer[1]):
            raise _refused("the API key is not one of this server's", "invalid_api_key")

    def _is_known(self, key: bytes) -> bool:
        digest = _digest(key)
        # All are compared, whichever matches.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return True in matches


def _authorizations(scope: Scope) -> Iterator[bytes]:
    return (value for name, value in scope["headers"] if name == b"authorization")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refused(message: str, code: str) -> ApiError:
    challenge = "Bearer" if code == "missing_api_key" else 'Bearer error="invalid_token"'
    return ApiError(401, message, type_="authentication_error", code=code, headers={"WWW-Authenticate": challenge})
