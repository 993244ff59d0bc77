"""Which requests can be served: checked by the front end, by the offline API, and again at the engine's boundary."""

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.types import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SEED_RANGE,
    InvalidRequestError,
    SamplingParams,
)

Tokens = Sequence[int] | NDArray[np.int32]

MAX_TOP_K = (1 << 31) - 1
PRIORITY_LIMIT = 1 << 31
"""Priorities are from -PRIORITY_LIMIT to PRIORITY_LIMIT - 1."""
MAX_CACHE_SALT = 256


def validate_priority(priority: int) -> None:
    """Raise InvalidRequestError for a priority that is not a 32-bit integer."""
    _check_integer("priority", priority, -PRIORITY_LIMIT, PRIORITY_LIMIT - 1)


def validate_cache_salt(salt: str) -> None:
    """Raise InvalidRequestError for a salt that is no text of at most MAX_CACHE_SALT characters."""
    if not isinstance(salt, str) or len(salt) > MAX_CACHE_SALT:
        raise InvalidRequestError("cache_salt", f"cache_salt has to be a text of at most {MAX_CACHE_SALT} characters")


def unpack_prompt(packed: bytes) -> NDArray[np.int32]:
    """The token ids of a request's packed prompt. Raises InvalidRequestError where they are not whole numbers of it."""
    if len(packed) % np.dtype(np.int32).itemsize:
        raise InvalidRequestError("prompt", f"the prompt has {len(packed)} bytes, which are not whole token ids")
    return np.frombuffer(packed, np.int32)


def validate_padding(padding: int | None, block_length: int) -> None:
    """Raise InvalidRequestError for pads in front of a text that are a block or more."""
    if padding is not None:
        _check_integer("padding", padding, 0, block_length - 1)


def validate_score(token_ids: Tokens, top: int, *, vocab_size: int, max_length: int) -> None:
    """Raise InvalidRequestError, naming the field, for a text that cannot be scored. `max_length` is in tokens."""
    _check_integer("logprobs", top, 0, MAX_LOGPROBS)
    _check_prompt(token_ids, vocab_size)
    if len(token_ids) > max_length:
        message = f"the text has {len(token_ids)} tokens, but at most {max_length} can be scored at once"
        raise InvalidRequestError("prompt", message)


def validate_request(token_ids: Tokens, params: SamplingParams, *, vocab_size: int, max_length: int) -> None:
    """Raise InvalidRequestError, naming the field, for a prompt and parameters that cannot be served together.

    `max_length` is in tokens, prompt and answer together.
    """
    _check_number("temperature", params.temperature, 0, 2)
    _check_number("top_p", params.top_p, 0, 1, above=True)
    _check_number("min_p", params.min_p, 0, 1)
    _check_integer("top_k", params.top_k, -1, MAX_TOP_K)
    if params.seed is not None:
        _check_integer("seed", params.seed, 0, SEED_RANGE - 1)
    _check_adjustments(params, vocab_size)
    if params.logprobs is not None:
        _check_integer("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _check_stops(params, vocab_size)
    _check_prompt(token_ids, vocab_size)
    _check_lengths(len(token_ids), params, max_length)


def _check_prompt(token_ids: Tokens, vocab_size: int) -> None:
    if not len(token_ids):
        raise InvalidRequestError("prompt", "the prompt is empty; it has to hold at least one token")
    if not isinstance(token_ids, np.ndarray):
        _check_tokens("prompt", token_ids, vocab_size)
    elif token_ids.min() < 0 or token_ids.max() >= vocab_size:
        _check_tokens("prompt", token_ids.tolist(), vocab_size)


def _check_adjustments(params: SamplingParams, vocab_size: int) -> None:
    _check_number("presence_penalty", params.presence_penalty, -2, 2)
    _check_number("frequency_penalty", params.frequency_penalty, -2, 2)
    _check_number("repetition_penalty", params.repetition_penalty, 0, sys.float_info.max, above=True)
    bias = params.logit_bias
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(
            "logit_bias", f"logit_bias holds {len(bias)} tokens; at most {MAX_LOGIT_BIAS} are allowed"
        )
    _check_tokens("logit_bias", [token for token, _ in bias], vocab_size)
    for _, value in bias:
        _check_number("logit_bias", value, -100, 100)


def _check_stops(params: SamplingParams, vocab_size: int) -> None:
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            "stop_token_ids",
            f"stop_token_ids holds {len(params.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
        )
    _check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    for string in params.stop:
        if not _is_text(string):
            raise InvalidRequestError("stop", "a stop string has to be a text of at least one character")
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise InvalidRequestError("stop", "a stop string has to be valid Unicode: it holds an unpaired surrogate")


def _check_lengths(prompt_tokens: int, params: SamplingParams, max_length: int) -> None:
    if prompt_tokens >= max_length:
        raise InvalidRequestError(
            "prompt",
            f"the prompt has {prompt_tokens} tokens, but the model's length is {max_length} tokens, prompt and answer "
            "together; shorten the prompt",
        )
    if not _is_integer(params.max_tokens) or params.max_tokens < 1:
        raise InvalidRequestError(
            "max_tokens", f"max_tokens has to be an integer of at least 1, not {_show(params.max_tokens)}"
        )
    if prompt_tokens + params.max_tokens > max_length:
        raise InvalidRequestError(
            "max_tokens",
            f"the prompt has {prompt_tokens} tokens and max_tokens is {_show(params.max_tokens)}, but the model's "
            f"length is {max_length} tokens, prompt and answer together; ask for at most {max_length - prompt_tokens}",
        )
    if not _is_integer(params.min_tokens) or not 0 <= params.min_tokens <= params.max_tokens:
        raise InvalidRequestError(
            "min_tokens",
            f"min_tokens has to be an integer from 0 to max_tokens, which is {params.max_tokens}, not "
            f"{_show(params.min_tokens)}",
        )


def _check_tokens(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    # Prompts are long: let the interpreter's own loops find out whether any id is at fault, then look for it.
    if set(map(type, token_ids)) <= {int} and (not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)):
        return
    wrong = next(token for token in token_ids if not _is_integer(token) or not 0 <= token < vocab_size)
    raise InvalidRequestError(
        param, f"{param} holds {_show(wrong)}, which is not a token id: ids are integers from 0 to {vocab_size - 1}"
    )


def _check_integer(param: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(param, f"{param} has to be an integer from {low} to {high}, not {_show(value)}")


def _check_number(param: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    # NaN fails every comparison.
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not low <= value <= high
        or (above and value == low)
    ):
        start = f"above {low}" if above else f"from {low}"
        end = "" if high == sys.float_info.max else f" to {high}"
        raise InvalidRequestError(param, f"{param} has to be a number {start}{end}, not {_show(value)}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: object) -> str:
    """A value for a message, however long or strange it is."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
