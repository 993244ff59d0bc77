"""What /v1/completions takes and gives: the request's fields with their types, and the shapes of its answers.

Ranges of numbers are the business of `engine.validation`, which the engine's boundary and the offline API share.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from engine.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, InvalidRequestError
from engine.validation import MAX_CACHE_SALT, PRIORITY_LIMIT
from server.errors import ApiError, invalid

Prompt = str | list[int]

MAX_STOP_CHARACTERS = 1024
"""Every answer of a request prepares its own search for each stop string."""

PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}

LOGIT_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LOGIT_BIAS,
}


class StrictModel(BaseModel):
    """Fields of a request as they have to be: none unknown, none of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


M = TypeVar("M", bound=StrictModel)


class StreamOptions(StrictModel):
    """Options that go with `stream`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class CompletionRequest(StrictModel):
    """The fields of a completion request; null stands for the default and was removed before."""

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: Annotated[int, Field(ge=1)] = 1
    best_of: int | None = None
    stop: Annotated[list[Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]], BeforeValidator(_as_list)] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[str, Any], WithJsonSchema(LOGIT_BIAS_SCHEMA)] = {}
    logprobs: int | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    echo: bool = False
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str = ""
    priority: Annotated[int, Field(ge=-PRIORITY_LIMIT, lt=PRIORITY_LIMIT)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}\z")] | None = None

    @property
    def echo_only(self) -> bool:
        """Whether the prompt alone is the answer."""
        return self.echo and self.max_tokens == 0

    @property
    def score_top(self) -> int | None:
        """How many of the likeliest tokens at each of the prompts' are asked for; None where no logprobs are."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((top for top in asked if top is not None), default=None)


def parse_fields(kind: type[M], fields: dict[str, Any]) -> M:
    """The request in a JSON object without nulls. Raises ApiError 400 whose `param` names the field at fault."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid(error.errors(include_url=False, include_context=False)[0]) from None


def parse_completion_request(body: dict[str, Any]) -> CompletionRequest:
    """The request in a JSON object without nulls. Raises ApiError 400 whose `param` names the field at fault."""
    body = dict(body)
    options = body.get("stream_options")
    if isinstance(options, dict):
        body["stream_options"] = {name: value for name, value in options.items() if value is not None}
    request = parse_fields(CompletionRequest, body)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options goes with stream: true only")
    if request.best_of is not None and request.best_of != request.n:
        raise invalid("best_of", f"best_of has to equal n, which is {show(request.n)}: answers are not ranked")
    if request.suffix:
        raise invalid("suffix", "suffix has to be empty: this model does not insert text", "unsupported_parameter")
    return request


def parse_prompts(prompt: object) -> list[Prompt]:
    """The prompts in any of the four forms: a text, texts, token ids, lists of token ids.

    Raises InvalidRequestError. Whether the ids are in the vocabulary is not looked at.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise _not_a_prompt(f"not {show(prompt)}")
    if not prompt:
        raise InvalidRequestError("prompt", "prompt is an empty list; it has to hold at least one prompt or token id")
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return prompt
    if kinds == {int}:
        return [prompt]
    if kinds != {list}:
        raise _not_a_prompt("not a list of other or different things")
    for index, ids in enumerate(prompt):
        if not ids:
            raise InvalidRequestError(
                "prompt", f"prompt {index} is an empty list; it has to hold at least one token id"
            )
        if set(map(type, ids)) != {int}:
            raise _not_a_prompt(f"and prompt {index} holds something else than integers")
    return prompt


def show(value: object) -> str:
    """A client's value for a message: short, whatever it is."""
    if isinstance(value, str):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:20]}... ({len(text)} characters)"


def _as_invalid(error: ErrorDetails) -> ApiError:
    # Below a field of the request only names of fields follow; indices of lists are for the message.
    names = [step[:64] for step in error["loc"] if isinstance(step, str)]
    field = ".".join(names)
    if error["type"] == "extra_forbidden":
        return invalid(field, f"{field} is not a field of this request", "unknown_parameter")
    if error["type"] == "missing":
        return invalid(field, f"{field} is missing", "missing_parameter")
    place = "".join(f"[{step}]" for step in error["loc"] if isinstance(step, int))
    return invalid(field, f"{field}{place}: {error['msg']}, not {show(error['input'])}")


def _not_a_prompt(but: str) -> InvalidRequestError:
    message = f"prompt has to be a text, a list of texts, a list of token ids or a list of lists of token ids, {but}"
    return InvalidRequestError("prompt", message)


# --- Answers -----------------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Part of Usage."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a whole HTTP request; every prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class LogprobsBody(msgspec.Struct, frozen=True, kw_only=True):
    """An entry a token. The first token of a text has null instead of numbers: nothing predicts it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """As many of the likeliest as were asked for, best first, and the token itself."""
    text_offset: list[int]
    """Where in the answer's text the token begins, in characters."""


class PromptLogprob(msgspec.Struct, frozen=True):
    """Of `prompt_logprobs`: how likely a token was."""

    logprob: float
    decoded_token: str


class ChoiceBody(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, or what a chunk adds to it."""

    index: int
    """prompt index x n + number of the answer to that prompt."""
    text: str
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    logprobs: LogprobsBody | None = None
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of the answer, or of what the chunk adds to it; left out unless the client asked for them."""
    prompt_token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """With `token_ids`, but in the first chunk of an answer only."""
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    """An entry a prompt token, by token ids; in the first chunk only, and left out unless asked for."""


class CompletionBody(msgspec.Struct, frozen=True, kw_only=True):
    """A completion, or a chunk of a stream, where `usage` is left out unless the client asked for it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[ChoiceBody]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
