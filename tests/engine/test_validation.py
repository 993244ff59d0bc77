import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.types import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, InvalidRequestError, SamplingParams
from engine.validation import MAX_CACHE_SALT, validate_cache_salt, validate_priority, validate_request

VOCAB_SIZE = 100
MAX_LENGTH = 32


def check(token_ids: Any = (1, 2, 3), **params: Any) -> None:
    validate_request(token_ids, SamplingParams(**params), vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH)


def fault(token_ids: Any = (1, 2, 3), **params: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check(token_ids, **params)
    return caught.value


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"temperature": 2},
        {"temperature": 1e-300},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1.0},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"seed": None},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"max_tokens": 1},
        {"max_tokens": 29},
        {"min_tokens": 16},
        {"stop": ("a", "\ufffd")},
        {"stop_token_ids": (0, 99)},
        {"stop_token_ids": tuple(range(MAX_STOP_TOKEN_IDS))},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e308},
        {"logit_bias": tuple((token % 100, 100) for token in range(MAX_LOGIT_BIAS))},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
)
def test_what_can_be_served_passes(params: dict[str, Any]) -> None:
    check(**params)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("temperature", [-0.1, 2.1, math.nan, math.inf, -math.inf, 10**400, True, "1", None]),
        ("top_p", [0, -1, 1.1, math.nan, math.inf, True, "1", None]),
        ("min_p", [-0.1, 1.1, math.nan, math.inf, False, "1", None]),
        ("presence_penalty", [-2.1, 2.1, math.nan, math.inf, True, "1", None]),
        ("frequency_penalty", [-2.1, 2.1, math.nan, math.inf, False, "1", None]),
        ("repetition_penalty", [0, -1, math.nan, math.inf, True, "1", None]),
        ("logit_bias", [((100, 1),), ((-1, 1),), ((5, 101),), ((5, math.nan),), ((5, True),), ((1, 1),) * 301]),
        ("logprobs", [-1, 21, 1.0, True, "1"]),
        ("top_k", [-2, 2**31, 10**5000, 1.0, math.nan, True, "1", None]),
        ("seed", [-1, 2**63, 1.0, math.nan, True, "1"]),
        ("max_tokens", [0, -1, 30, 10**5000, 1.0, math.nan, True, "1", None]),
        ("min_tokens", [-1, 17, 10**5000, 1.0, math.nan, False, "1", None]),
        ("stop", [("",), ("a", ""), ("\ud800",), (1,), (None,)]),
        ("stop_token_ids", [(-1,), (100,), (1, 2**70), (1.0,), (True,), ("1",), tuple(range(MAX_STOP_TOKEN_IDS + 1))]),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        error = fault(**{param: value})
        assert error.param == param, value
        assert len(error.message) < 300


@pytest.mark.parametrize("token_ids", [(), (100,), (-1,), (1, 10**5000), (1.0,), (True,), ("1",), tuple([1] * 32)])
def test_prompts_that_cannot_be_served_are_refused(token_ids: tuple[Any, ...]) -> None:
    assert fault(token_ids).param == "prompt"


@pytest.mark.parametrize(
    ("token_ids", "params", "message"),
    [
        ((), {}, "the prompt is empty; it has to hold at least one token"),
        ((1, 100), {}, "prompt holds 100, which is not a token id: ids are integers from 0 to 99"),
        (
            (1,) * 30, {"max_tokens": 4},
            "the prompt has 30 tokens and max_tokens is 4, but the model's length is 32 tokens, .*; ask for at most 2",
        ),
        (
            (1,) * 40, {},
            "the prompt has 40 tokens, but the model's length is 32 tokens, .*; shorten the prompt",
        ),
        ((1,), {"temperature": 3}, "temperature has to be a number from 0 to 2, not 3"),
        ((1,), {"top_p": 0.0}, "top_p has to be a number above 0 to 1, not 0.0"),
        ((1,), {"top_k": 10**5000}, "top_k has to be an integer from -1 to 2147483647, not an integer of 16610 bits"),
        ((1,), {"seed": "x" * 500}, f"seed has to be an integer from 0 to 9223372036854775807, not '{'x' * 76}..."),
        ((1,), {"min_tokens": 17}, "min_tokens has to be an integer from 0 to max_tokens, which is 16, not 17"),
    ],
)  # fmt: skip
def test_messages_give_the_numbers(token_ids: tuple[int, ...], params: dict[str, Any], message: str) -> None:
    assert re.fullmatch(message, fault(token_ids, **params).message)


@pytest.mark.parametrize("priority", [0, -(2**31), 2**31 - 1])
def test_priorities_of_32_bits_pass(priority: int) -> None:
    validate_priority(priority)


@pytest.mark.parametrize("salt", ["", "tenant", "x" * MAX_CACHE_SALT, "\ud800"])
def test_salts_are_any_text_of_bounded_length(salt: str) -> None:
    validate_cache_salt(salt)


@pytest.mark.parametrize("salt", ["x" * (MAX_CACHE_SALT + 1), None, 3, b"x"])
def test_other_salts_are_refused(salt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_cache_salt(salt)
    assert caught.value.param == "cache_salt"


@pytest.mark.parametrize("priority", [-(2**31) - 1, 2**31, 0.0, math.nan, True, "0", None])
def test_other_priorities_are_refused(priority: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_priority(priority)
    assert caught.value.param == "priority"


anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))


@given(st.lists(anything, max_size=4), st.fixed_dictionaries({}, optional={
    "temperature": anything, "top_p": anything, "min_p": anything, "top_k": anything, "seed": anything,
    "max_tokens": anything, "min_tokens": anything, "stop": st.lists(anything, max_size=2),
    "stop_token_ids": st.lists(anything, max_size=2),
}))  # fmt: skip
def test_nothing_but_a_named_refusal_ever_comes_out(token_ids: list[Any], params: dict[str, Any]) -> None:
    outcome = "passed"
    try:
        check(token_ids, **params)
    except InvalidRequestError as error:
        outcome = error.param
    assert outcome in {"passed", "prompt", *SamplingParams.__struct_fields__}
