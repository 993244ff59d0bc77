"""The HTTP application: its routes, and errors in the envelope."""

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from server.api_keys import METRICS_PATH, PROBE_PATHS, ApiKeyGuard
from server.app_state import AppState
from server.completions import read_completion
from server.errors import ApiError, draining, unavailable
from server.model_names import unknown_model
from server.openapi import gives, gives_text, takes
from server.protocol import CompletionBody, CompletionRequest
from server.request_scope import RequestScope
from server.tokenization import (
    DetokenizeBody,
    DetokenizeRequest,
    TokenizeBody,
    TokenizeRequest,
    TokenizerInfoBody,
    detokenize,
    tokenize,
    tokenizer_info,
)
from server.version import VersionInfo

OPENMETRICS = "application/openmetrics-text"


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of GET /v1/models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "blockserve"
    root: str
    max_model_len: int | None
    """Tokens of prompt and answer together; None while the model loads."""


class LoadBody(msgspec.Struct, frozen=True):
    """GET /load: requests that hold a row, and requests that wait for one."""

    running: int
    waiting: int


class StatusBody(msgspec.Struct, frozen=True):
    """GET /health and GET /ready, where they are 200."""

    status: str


class ModelList(msgspec.Struct, frozen=True):
    """GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"


def create_app(state: AppState) -> FastAPI:
    """The application of one API process."""
    app = FastAPI(
        title="blockserve", version=state.version.version, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    if keys := state.settings.api_keys():
        open_paths = PROBE_PATHS | ({METRICS_PATH} if state.settings.metrics_without_key else frozenset())
        app.add_middleware(ApiKeyGuard, keys=keys, open_paths=open_paths)
    # Added last, so outermost: what the guard refuses has an id, a line in the log and the envelope too.
    app.add_middleware(RequestScope, recorder=state.metrics)
    app.add_exception_handler(HTTPException, _in_envelope)
    _add_api_routes(app, state)
    _add_tokenizer_routes(app, state)
    _add_operation_routes(app, state)
    return app


def _add_api_routes(app: FastAPI, state: AppState) -> None:
    async def completions(request: Request) -> Response:
        """Complete one or more prompts, whole or as a stream of server-sent events."""
        return await read_completion(request, state)

    async def models() -> Response:
        """The served model, once under each of its names."""
        return _json(ModelList(data=[_card(state, name) for name in state.model_names]))

    async def model(model_id: str) -> Response:
        """One of the served model's names."""
        if model_id not in state.model_names:
            raise unknown_model(model_id)
        return _json(_card(state, model_id))

    app.add_api_route(
        "/v1/completions",
        completions,
        methods=["POST"],
        openapi_extra=takes(CompletionRequest),
        responses=gives(CompletionBody, stream=True),
    )
    app.add_api_route("/v1/models", models, responses=gives(ModelList))
    app.add_api_route("/v1/models/{model_id:path}", model, responses=gives(ModelCard))


def _add_tokenizer_routes(app: FastAPI, state: AppState) -> None:
    async def post_tokenize(request: Request) -> Response:
        """The token ids of a text."""
        return _json(await tokenize(request, state))

    async def post_detokenize(request: Request) -> Response:
        """The text of token ids."""
        return _json(await detokenize(request, state))

    async def get_tokenizer_info() -> Response:
        """The special tokens and sizes of the tokenizer."""
        return _json(tokenizer_info(state))

    app.add_api_route(
        "/tokenize",
        post_tokenize,
        methods=["POST"],
        openapi_extra=takes(TokenizeRequest),
        responses=gives(TokenizeBody),
    )
    app.add_api_route(
        "/detokenize",
        post_detokenize,
        methods=["POST"],
        openapi_extra=takes(DetokenizeRequest),
        responses=gives(DetokenizeBody),
    )
    app.add_api_route("/tokenizer_info", get_tokenizer_info, responses=gives(TokenizerInfoBody))


def _add_operation_routes(app: FastAPI, state: AppState) -> None:
    async def health() -> Response:
        """Live: 200 through load, drain and restart of an engine; 503 if only a restart of the server helps."""
        if not state.service.healthy:
            raise unavailable(state.service.detail or "the server is not healthy", "unhealthy")
        return _json(StatusBody("ok"))

    async def ready() -> Response:
        """Whether a completion would be taken now."""
        if state.service.draining:
            raise draining()
        # The supervisor knows first of an engine's start, this process of its end.
        if not state.service.healthy or not state.service.engines_up or not state.engine.up:
            raise unavailable(state.service.detail or "no engine is ready yet", "not_ready")
        return _json(StatusBody("ready"))

    async def metrics(request: Request) -> Response:
        """Prometheus text, or OpenMetrics for who accepts it."""
        try:
            content_type, body = await state.render_metrics(OPENMETRICS in request.headers.get("accept", ""))
        except OSError:
            raise unavailable("the process that keeps the metrics does not answer") from None
        return Response(body, headers={"content-type": content_type})

    async def version() -> Response:
        """Version and, in a checkout, its commit."""
        return _json(state.version)

    async def load() -> Response:
        """How many requests run and wait, as the engines last said."""
        return _json(LoadBody(running=state.engine.load.running, waiting=state.engine.load.waiting))

    for path, endpoint, answers in (
        ("/health", health, gives(StatusBody)),
        ("/ready", ready, gives(StatusBody)),
        ("/version", version, gives(VersionInfo)),
        ("/load", load, gives(LoadBody)),
    ):
        app.add_api_route(path, endpoint, responses=answers)
    # The class's media type, or else the schema would say JSON.
    app.add_api_route("/metrics", metrics, responses=gives_text(OPENMETRICS), response_class=PlainTextResponse)


def _card(state: AppState, name: str) -> ModelCard:
    info = state.engine.info
    return ModelCard(
        id=name,
        created=state.started,
        root=state.settings.model or name,
        max_model_len=None if info is None else info.max_length,
    )


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _in_envelope(request: Request, error: Exception) -> Response:
    """What the router raises: no such path, no such method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: (f"there is nothing at {request.url.path}", "not_found"),
        405: (f"{request.url.path} does not take {request.method}", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (error.detail, None))
    return ApiError(error.status_code, message[:300], code=code, headers=error.headers).response()
