"""POST /tokenize, POST /detokenize and GET /tokenizer_info: the model's tokenizer, for clients that have none."""

from typing import Any

import msgspec
from starlette.requests import Request

from engine.types import InvalidRequestError
from server.app_state import AppState
from server.json_body import parse_json_object, read_body
from server.model_names import served_model
from server.off_loop import off_loop_if_long
from server.protocol import StrictModel, parse_fields, show


class TokenizeRequest(StrictModel):
    """The fields of POST /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(StrictModel):
    """The fields of POST /detokenize."""

    tokens: list[Any]
    """Token ids; of a long list, looking at each is left to `_check_tokens`, which is quicker."""
    model: str | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """What POST /tokenize answers."""

    count: int
    max_model_len: int | None
    """Tokens of prompt and answer together; None while the model loads."""
    tokens: list[int]
    token_strs: list[str] | None
    """How the vocabulary spells each token; None unless asked for."""


class DetokenizeBody(msgspec.Struct, frozen=True):
    """What POST /detokenize answers."""

    prompt: str


class TokenizerInfoBody(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /tokenizer_info answers: tokens as tokenizer_config.json names them, None for those that it does not."""

    eos_token: str | None
    eos_token_id: int | None
    bos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    max_model_len: int | None
    chat_template: None = None


async def tokenize(request: Request, state: AppState) -> TokenizeBody:
    """The token ids of a text. Raises ApiError or InvalidRequestError."""
    asked = parse_fields(TokenizeRequest, await _fields(request, state))
    served_model(state, asked.model)

    def encode() -> tuple[list[int], list[str] | None]:
        tokens = state.tokenizer.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
        return tokens, state.tokenizer.token_strings(tokens) if asked.return_token_strs else None

    tokens, strings = await off_loop_if_long(encode, len(asked.prompt))
    return TokenizeBody(count=len(tokens), max_model_len=_max_model_len(state), tokens=tokens, token_strs=strings)


async def detokenize(request: Request, state: AppState) -> DetokenizeBody:
    """The text of token ids, special tokens included. Raises ApiError or InvalidRequestError."""
    asked = parse_fields(DetokenizeRequest, await _fields(request, state))
    served_model(state, asked.model)
    tokens = asked.tokens
    _check_tokens(tokens, _vocab_size(state))
    text = await off_loop_if_long(lambda: state.tokenizer.decode(tokens, skip_special_tokens=False), len(tokens))
    return DetokenizeBody(prompt=text)


def tokenizer_info(state: AppState) -> TokenizerInfoBody:
    """What clients need to know of the tokenizer."""
    tokenizer = state.tokenizer
    return TokenizerInfoBody(
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        bos_token=tokenizer.bos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        vocab_size=_vocab_size(state),
        max_model_len=_max_model_len(state),
    )


async def _fields(request: Request, state: AppState) -> dict[str, Any]:
    return parse_json_object(await read_body(request, state.settings.max_body_bytes))


def _max_model_len(state: AppState) -> int | None:
    info = state.engine.info
    return None if info is None else info.max_length


def _vocab_size(state: AppState) -> int:
    """Ids are below this. A model may have more than its tokenizer, which then stand for nothing."""
    info = state.engine.info
    return max(state.tokenizer.vocab_size, 0 if info is None else info.vocab_size)


def _check_tokens(tokens: list[Any], vocab_size: int) -> None:
    if set(map(type, tokens)) <= {int} and all(map(range(vocab_size).__contains__, tokens)):
        return
    wrong = next(token for token in tokens if type(token) is not int or not 0 <= token < vocab_size)
    message = f"tokens holds {show(wrong)}, which is not a token id: ids are integers from 0 to {vocab_size - 1}"
    raise InvalidRequestError("tokens", message)
