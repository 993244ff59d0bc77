"""Models, probes, metrics, version, and what there is not."""

import logging
import re

import httpx
import pytest
from starlette.routing import Route

from engine.messages import ServiceState
from engine.types import EngineLoad, GenerationRequest
from tests.server.fakes import FakeEngine, Harness
from tests.server.test_hostile_requests import is_envelope


async def get(harness: Harness, path: str, method: str = "GET", **options: dict[str, str]) -> httpx.Response:
    async with harness.client() as client:
        return await client.request(method, path, **options)  # type: ignore[arg-type]


async def test_models() -> None:
    card = {"object": "model", "created": 1_700_000_000, "owned_by": "blockserve", "max_model_len": 256}
    cards = [{"id": name, "root": name, **card} for name in ("fox", "fox-alias")]
    assert (await get(Harness(), "/v1/models")).json() == {"object": "list", "data": cards}
    assert (await get(Harness(), "/v1/models/fox-alias")).json() == cards[1]


async def test_a_model_that_is_not_served() -> None:
    response = await get(Harness(), "/v1/models/some/other")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"


async def test_models_while_the_engine_starts() -> None:
    harness = Harness()
    harness.engine.info = None
    assert (await get(harness, "/v1/models/fox")).json()["max_model_len"] is None


@pytest.mark.parametrize(
    ("service", "health", "ready"),
    [
        (ServiceState(healthy=True, engines_up=1, draining=False), 200, 200),
        (ServiceState(healthy=True, engines_up=0, draining=False, detail="restarting"), 200, 503),
        (ServiceState(healthy=True, engines_up=1, draining=True), 200, 503),
        (ServiceState(healthy=False, engines_up=1, draining=False, detail="a step hangs"), 503, 503),
    ],
)
async def test_probes(service: ServiceState, health: int, ready: int) -> None:
    harness = Harness()
    harness.state.service = service
    for path, status in (("/health", health), ("/ready", ready)):
        response = await get(harness, path)
        assert response.status_code == status
        if status == 503:
            assert is_envelope(response.json())
            assert service.detail in response.json()["error"]["message"]
            assert response.headers["retry-after"]


async def test_not_ready_while_this_process_has_no_engine_whatever_the_supervisor_says() -> None:
    harness = Harness()
    harness.state.service = ServiceState(healthy=True, engines_up=1, draining=False)
    harness.engine.up = False
    response = await get(harness, "/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert (await get(harness, "/health")).status_code == 200


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ({}, False),
        ({"accept": "text/plain"}, False),
        ({"accept": "application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"}, True),
    ],
)
async def test_metrics(accept: dict[str, str], openmetrics: bool) -> None:
    harness = Harness()
    response = await get(harness, "/metrics", headers=accept)
    assert (response.status_code, response.content) == (200, b"# HELP x\n")
    assert response.headers["content-type"] == "text/plain; version=0.0.4"
    assert harness.rendered == [openmetrics]


async def test_metrics_whose_keeper_is_silent() -> None:
    harness = Harness()
    harness.render_error = TimeoutError()
    response = await get(harness, "/metrics")
    assert response.status_code == 503
    assert is_envelope(response.json())


async def test_version() -> None:
    assert (await get(Harness(), "/version")).json() == {"version": "1.2.3", "commit": "abc"}


async def test_the_load_is_what_the_engine_said_last() -> None:
    harness = Harness()
    assert (await get(harness, "/load")).json() == {"running": 0, "waiting": 0}
    harness.engine.load = EngineLoad(running=3, waiting=7, pages_used=5)
    assert (await get(harness, "/load")).json() == {"running": 3, "waiting": 7}


def paths_that_get_works_on() -> list[str]:
    """Every route of the application that takes GET, as a path, and one that is not there."""
    routes = [route for route in Harness().app.routes if isinstance(route, Route) and "GET" in (route.methods or ())]
    return [*(route.path.replace("{model_id:path}", "fox") for route in routes), "/nothing"]


def test_the_paths_are_those_of_the_contract() -> None:
    expected = {"/v1/models", "/v1/models/fox", "/health", "/ready", "/metrics", "/version", "/load", "/tokenizer_info"}
    assert expected <= set(paths_that_get_works_on())


@pytest.mark.parametrize("path", paths_that_get_works_on())
async def test_head_is_get_without_the_body(path: str) -> None:
    harness = Harness()
    head, whole = await get(harness, path, "HEAD"), await get(harness, path)
    assert head.content == b""
    assert head.status_code == whole.status_code
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/", "/v1/chat/completions", "/docs", "/health/"])
async def test_paths_that_are_not_there(path: str) -> None:
    response = await get(Harness(), path)
    assert response.status_code == 404
    assert is_envelope(response.json())
    assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/completions"), ("HEAD", "/v1/completions"), ("POST", "/health"), ("GET", "/tokenize")],
)
async def test_methods_that_a_path_does_not_take(method: str, path: str) -> None:
    response = await get(Harness(), path, method)
    assert response.status_code == 405
    assert response.headers["allow"]
    if method != "HEAD":
        assert is_envelope(response.json())


async def test_the_schema_names_every_field() -> None:
    schema = (await get(Harness(), "/openapi.json")).json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "max_tokens", "stop_token_ids"} <= set(body["properties"])


async def test_a_clients_request_id_is_echoed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    with caplog.at_level(logging.INFO, logger="server"):
        async with harness.client() as client:
            by_header = await client.post("/v1/completions", json={"prompt": "Hi"}, headers={"x-request-id": "mine-1"})
            by_body = await client.post("/v1/completions", json={"prompt": "Hi", "request_id": "mine-2"})
            neither = await client.post("/v1/completions", json={"prompt": "Hi"})
            unusable = await client.get("/v1/models", headers={"x-request-id": "x" * 500})
    assert by_header.headers["x-request-id"] == "mine-1"
    assert by_body.headers["x-request-id"] == "mine-2"
    ids = [vars(record)["id"] for record in caplog.records]
    assert [vars(record).get("client_id") for record in caplog.records] == ["mine-1", "mine-2", None, None]
    assert len(set(ids)) == 4
    assert neither.headers["x-request-id"] == ids[2]
    assert neither.json()["id"] == f"cmpl-{ids[2]}"
    assert unusable.headers["x-request-id"] == ids[3]


async def test_one_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    with caplog.at_level(logging.INFO, logger="server"):
        await harness.complete(n=2, user="someone", max_tokens=5)
        await get(harness, "/health")
        await harness.complete(temperature=7)
    done, refused = (vars(record) for record in caplog.records)
    expected = {
        "method": "POST", "path": "/v1/completions", "status": 200, "model": "fox", "stream": False, "choices": 2,
        "completion_tokens": 10, "outcome": "length", "user": "someone",
    }  # fmt: skip
    assert {name: done[name] for name in expected} == expected
    assert done["duration_s"] >= done["first_token_s"] >= 0
    assert (refused["status"], "temperature" in refused["error"]) == (400, True)


async def test_a_fault_of_ours_is_a_500_with_an_id_that_the_log_has(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: GenerationRequest) -> list[object]:
        raise RuntimeError("a secret path")

    harness = Harness(FakeEngine(broken))  # type: ignore[arg-type]
    response = await harness.complete()
    assert response.status_code == 500
    assert is_envelope(response.json())
    message = response.json()["error"]["message"]
    assert "secret" not in message
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(vars(record)["id"], message)
    assert record.exc_info is not None


async def test_labels_hold_no_text_of_a_client() -> None:
    harness = Harness()
    await get(harness, "/v1/models/fox")
    await get(harness, "/v1/models/guess")
    await get(harness, "/etc/passwd")
    await get(harness, "/health", "BREW")
    await get(harness, "/health", "HEAD")
    http = {key[1:]: value for key, value in harness.count().counters.items() if key[0] == "http_requests_total"}
    assert http == {
        ("/v1/models/{model_id:path}", "GET", "200"): 1,
        ("/v1/models/{model_id:path}", "GET", "404"): 1,
        ("other", "GET", "404"): 1,
        ("/health", "other", "405"): 1,
        ("/health", "HEAD", "200"): 1,
    }
