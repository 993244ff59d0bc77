"""Who may come in, and that a key is never told."""

import asyncio
import hmac
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from server.api_keys import ApiKeyGuard, check_key, read_key_file
from tests.server.fakes import Harness
from tests.server.test_hostile_requests import is_envelope
from tests.server.test_over_http import listening, read_head

KEYS = ("sk-first~!", "sk-second")
OPEN = {"/health", "/ready"}


def guarded(**settings: Any) -> Harness:
    return Harness(api_key=KEYS, **settings)


async def get(
    harness: Harness, path: str, authorization: str | None = None, method: str = "GET", **options: Any
) -> httpx.Response:
    headers = {} if authorization is None else {"authorization": authorization}
    async with harness.client() as client:
        return await client.request(method, path, headers=headers, **options)


def every_route() -> list[tuple[str, str]]:
    """Method and path of every route of the application, and of one that is not there."""
    routes = [route for route in Harness().app.routes if isinstance(route, Route)]
    return [
        *(
            (method, route.path.replace("{model_id:path}", "fox"))
            for route in routes
            for method in sorted(route.methods or ())
        ),
        ("GET", "/nothing"),
        ("OPTIONS", "/v1/completions"),
    ]


@pytest.mark.parametrize(("method", "path"), every_route())
async def test_every_path_but_the_probes_needs_a_key(method: str, path: str) -> None:
    harness = guarded()
    refused = await get(harness, path, method=method)
    if path in OPEN:
        assert refused.status_code == 200
        return
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["x-request-id"]
    if method != "HEAD":
        assert is_envelope(refused.json())
        assert refused.json()["error"]["code"] == "missing_api_key"
    assert (await get(harness, path, f"Bearer {KEYS[1]}", method)).status_code != 401


async def test_metrics_are_open_by_choice_only() -> None:
    assert (await get(guarded(), "/metrics")).status_code == 401
    assert (await get(guarded(metrics_without_key=True), "/metrics")).status_code == 200
    assert (await get(guarded(metrics_without_key=True), "/v1/models")).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
@pytest.mark.parametrize("key", KEYS)
async def test_each_key_opens(key: str, scheme: str) -> None:
    response = await get(guarded(), "/v1/completions", f"{scheme} {key}", "POST", json={"prompt": "Hi"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}",
     f"Bearer {KEYS[0].upper()}", f"Bearer {KEYS[0]},{KEYS[1]}", f"Bearer {KEYS[0]} {KEYS[1]}", f"Bearer x{KEYS[0]}",
     f"X Bearer {KEYS[0]}", "Bearer \xe9", "Bearer " + "x" * 10_000],
    ids=lambda value: value[:20],
)  # fmt: skip
async def test_anything_else_does_not(authorization: str, caplog: pytest.LogCaptureFixture) -> None:
    harness = guarded()
    with caplog.at_level(logging.DEBUG):
        async with harness.client() as client:
            response = await client.post(
                "/v1/completions", json={"prompt": "Hi"}, headers={b"authorization": authorization.encode("latin-1")}
            )
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert harness.engine.groups == []
    assert not any(key in response.text for key in KEYS)
    assert not any(key in str(vars(record)) for key in KEYS for record in caplog.records)


async def test_of_two_authorizations_none_counts() -> None:
    async with guarded().client() as client:
        headers = [("authorization", f"Bearer {KEYS[0]}"), ("authorization", "Bearer other")]
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_without_keys_nobody_needs_one() -> None:
    assert (await get(Harness(), "/v1/models")).status_code == 200
    assert (await get(Harness(), "/v1/models", "Bearer whatever")).status_code == 200


async def test_a_refusal_is_a_line_in_the_log_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    harness = guarded()
    with caplog.at_level(logging.INFO, logger="server"):
        await get(harness, "/v1/models")
    (record,) = caplog.records
    assert vars(record)["status"] == 401
    assert harness.count().counters["http_requests_total", "other", "GET", "401"] == 1


TRICKS = [
    "/v1/models?/health",
    "/v1/models#/health",
    "/v1/models;/health",
    "/health/../v1/models",
    "/health/%2e%2e/v1/models",
    "/health%2f..%2fv1/models",
    "//v1/models",
    "/health//",
    "/%68ealth",
    "/%6detrics",
    "/v1/models%00/health",
    "http://health/v1/models",
    "http://x/v1/models?http://x/health",
]


@pytest.mark.parametrize("target", TRICKS)
async def test_no_spelling_of_a_path_gets_by(target: str) -> None:
    async with listening(guarded()) as server:
        reader, writer = await server.connect()
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x/health?\r\nX-Forwarded-Prefix: /health\r\n\r\n".encode())
        status, _ = await asyncio.wait_for(read_head(reader), 5)
        writer.close()
    assert status in (400, 401)


@pytest.mark.parametrize("target", ["/health", "/ready?verbose=1", "http://x/health"])
async def test_probes_are_open_over_a_connection(target: str) -> None:
    async with listening(guarded()) as server:
        reader, writer = await server.connect()
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await asyncio.wait_for(read_head(reader), 5))[0] == 200
        writer.close()


async def test_a_path_that_is_not_known_as_it_came_needs_a_key() -> None:
    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope)

    guard = ApiKeyGuard(app, KEYS, frozenset({b"/health"}))
    scope: dict[str, Any] = {"type": "http", "path": "/health", "headers": []}
    with pytest.raises(Exception, match="needs an API key"):
        await guard(scope, None, None)  # type: ignore[arg-type]
    await guard({**scope, "raw_path": b"/health"}, None, None)  # type: ignore[arg-type]
    assert [one["raw_path"] for one in passed] == [b"/health"]


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = ApiKeyGuard(None, KEYS, frozenset())  # type: ignore[arg-type]
    assert guard._is_known(KEYS[0].encode())
    assert not guard._is_known(b"x" * 1000)
    assert len(compared) == 2 * len(KEYS)
    assert {len(side) for pair in compared for side in pair} == {32}


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# alice\n sk-1 \n\n#sk-old\nsk-2#not-a-comment\r\n", encoding="utf-8")
    assert read_key_file(path) == ["sk-1", "sk-2#not-a-comment"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"fine\nsecret phrase\n", "line 2: a key has to be of visible ASCII"),
        (b"secret,secret\n", "line 1: "),
        ("sécret\n".encode(), "line 1: "),
        (b"\xffsecret", "not UTF-8"),
    ],
)
def test_a_bad_file_is_not_quoted(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_key_file(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "a,b", "é", "line\n", "\x7f"])
def test_what_cannot_be_a_key(key: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        check_key(key)


def test_a_key_may_be_of_any_other_visible_character() -> None:
    key = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != ",")
    assert check_key(key) == key


async def test_the_schema_is_not_for_everybody_either() -> None:
    assert (await get(guarded(), "/openapi.json")).status_code == 401
    assert json.loads((await get(guarded(), "/openapi.json", f"Bearer {KEYS[0]}")).text)["paths"]
