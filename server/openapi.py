"""What /openapi.json says of a route: the fields it takes, with their ranges, and all that it answers."""

from typing import Any

import msgspec

from engine.types import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from engine.validation import MAX_TOP_K
from server.errors import ErrorBody
from server.protocol import MAX_STOP_CHARACTERS, StrictModel

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}

STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}

RANGES: dict[str, Schema] = {
    "max_tokens": {"type": "integer", "minimum": 0},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": MAX_TOP_K},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "min_tokens": {"type": "integer", "minimum": 0},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
    "best_of": {"type": "integer", "minimum": 1},
    "truncate_prompt_tokens": {"type": "integer", "minimum": -1, "not": {"const": 0}},
    "stop": {"anyOf": [STOP, {"type": "array", "items": STOP}]},
    "stop_token_ids": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "maxItems": MAX_STOP_TOKEN_IDS,
    },
    "suffix": {"type": "string", "maxLength": 0},
    "request_id": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
}
"""Of the fields of requests that are not checked by their models, but by `engine.validation` and the routes."""

RETRY_AFTER: Schema = {
    "required": True,
    "description": "Seconds after which it is worth to try again.",
    "schema": {"type": "string", "pattern": "^[0-9]+$"},
}


def takes(model: type[StrictModel]) -> Schema:
    """What a route that reads its body itself adds to its operation: the schema of that body."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _as_sent(schema)}}}}


def gives(body: type[msgspec.Struct] | Schema, *, stream: bool = False) -> dict[int | str, Schema]:
    """The answers of a route: `body` (a structure, or a schema of JSON), its events if it streams, the envelope."""
    schema = body if isinstance(body, dict) else _inlined(msgspec.json.schema(body))
    content = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": _event(schema)}
    return {200: {"description": "Success", "content": content}} | errors()


def gives_text(media_type: str) -> dict[int | str, Schema]:
    """The answers of a route whose success is text, of this type besides that of its response class."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {200: {"description": "Success", "content": content}} | errors()


def errors() -> dict[int | str, Schema]:
    """The envelope, for whatever goes wrong."""
    content = {"application/json": {"schema": _envelope()}}
    later = {"Retry-After": RETRY_AFTER}
    return {
        "4XX": {"description": "The request cannot be served", "content": content},
        429: {"description": "The queue is full", "content": content, "headers": later},
        500: {"description": "The server failed", "content": content},
        503: {"description": "Not now", "content": content, "headers": later},
    }


def _envelope() -> Schema:
    return _inlined(msgspec.json.schema(ErrorBody))


def _event(schema: Schema) -> Schema:
    """A chunk, or an error once the status line is out; then the end."""
    told = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [schema, _envelope()]}}
    data = {"type": "string", "if": {"const": "[DONE]"}, "else": told}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _as_sent(schema: Schema) -> Schema:
    """An object's schema with the ranges above. What may be left out may be null, even where it is not known."""
    required = schema.get("required", [])
    fields = {
        name: _ranged(name, field) if name in required else _or_null(_ranged(name, field))
        for name, field in schema["properties"].items()
    }
    return schema | {"properties": fields, "additionalProperties": NULL}


def _ranged(name: str, field: Schema) -> Schema:
    if name not in RANGES:
        return field
    return {key: field[key] for key in ("title", "default") if key in field} | RANGES[name]


def _or_null(field: Schema) -> Schema:
    """The field or null, which stands for its default and is not told as one."""
    about = {key: field[key] for key in ("title", "default") if field.get(key) is not None}
    kinds = field.get("anyOf", [{key: value for key, value in field.items() if key not in ("title", "default")}])
    kinds = [_as_sent(kind) if "properties" in kind else kind for kind in kinds if kind != NULL]
    return about | {"anyOf": [*kinds, NULL]}


def _inlined(schema: Schema) -> Schema:
    """The schema without references: those of a schema on its own lead nowhere in a larger document."""
    definitions = schema.get("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            rest = {key: value for key, value in part.items() if key != "$ref"}
            return resolve(definitions[part["$ref"].rpartition("/")[2]] | rest)
        return {key: resolve(value) for key, value in part.items() if key != "$defs"}

    resolved: Schema = resolve(schema)
    return resolved
