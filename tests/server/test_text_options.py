"""Fields that shape the text of an answer, and what comes with it: whole and streamed."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.types import FinishReason
from tests.engine.tokenizers_of_tests import END_OF_TEXT
from tests.server.answers import everywhere, says, whole
from tests.server.fakes import EOS, REPLY, Harness, events, tokenizer

SPECIAL = END_OF_TEXT


# --- echo --------------------------------------------------------------------------------------------------------


async def test_an_echo_is_the_prompt_and_then_what_there_is_without() -> None:
    engine = says(tokenizer().encode(REPLY))
    plain = await everywhere(engine, prompt=["Hi, é", ""], n=2, max_tokens=100)
    echoed = await everywhere(engine, prompt=["Hi, é", ""], n=2, max_tokens=100, echo=True)
    assert [choice["text"] for choice in echoed["choices"]] == ["Hi, é" + REPLY] * 2 + [REPLY] * 2
    assert echoed["usage"] == plain["usage"]


async def test_an_echo_of_token_ids_is_their_text() -> None:
    ids = [*tokenizer().encode("Hé"), EOS, *tokenizer().encode("x")]
    engine = says(tokenizer().encode("y"))
    assert (await everywhere(engine, prompt=ids, echo=True))["choices"][0]["text"] == "Héxy"
    kept = await everywhere(engine, prompt=ids, echo=True, skip_special_tokens=False)
    assert kept["choices"][0]["text"] == f"Hé{SPECIAL}xy"


async def test_stop_strings_are_not_looked_for_in_an_echo() -> None:
    engine = says(tokenizer().encode("a fox and a dog"))
    answer = await everywhere(engine, prompt="fox f", echo=True, stop=["fox", "f a"], max_tokens=99)
    assert answer["choices"][0]["text"] == "fox fa "
    assert answer["choices"][0]["stop_reason"] == "fox"


async def test_an_echo_without_new_tokens_never_reaches_the_engine() -> None:
    engine = says([5])
    answer = await everywhere(engine, prompt=["Hi", "Ho ho"], n=2, max_tokens=0, echo=True, return_token_ids=True)
    assert engine.groups == []
    assert [choice["text"] for choice in answer["choices"]] == ["Hi", "Hi", "Ho ho", "Ho ho"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert all(choice["token_ids"] == [] for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens"] == len(tokenizer().encode("Hi")) + len(tokenizer().encode("Ho ho"))


async def test_an_echo_alone_counts_as_requests_without_tokens() -> None:
    harness = Harness()
    assert (await harness.complete(max_tokens=0, echo=True, n=2)).status_code == 200
    counted = harness.count()
    assert counted.counters["requests_total", "length"] == 2
    assert ("generation_tokens_total",) not in counted.counters
    assert counted.observations == {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"max_tokens": 0, "echo": True, "temperature": 9}, "temperature"),
        ({"max_tokens": 0, "echo": True, "prompt": [320]}, "prompt"),
        ({"max_tokens": 0, "echo": True, "prompt": [5] * 256}, "prompt"),
        ({"max_tokens": 0, "echo": True, "n": 1025}, "n"),
        ({"max_tokens": 0, "echo": True, "logprobs": 21}, "logprobs"),
    ],
)
async def test_what_goes_for_other_requests_goes_for_an_echo(fields: dict[str, Any], param: str) -> None:
    response = await Harness().complete(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# --- stops and special tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["fox", " said: n", "漢字 😀", "T"])
async def test_a_stop_string_is_in_the_text_where_that_is_asked_for(stop: str) -> None:
    engine = says(tokenizer().encode(REPLY))
    fields = {"stop": ["absent", stop], "max_tokens": 200}
    answer = (await everywhere(engine, **fields, include_stop_str_in_output=True))["choices"][0]
    assert answer["text"] == REPLY[: REPLY.index(stop) + len(stop)]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    assert (await everywhere(engine, **fields))["choices"][0]["text"] == REPLY[: REPLY.index(stop)]


@pytest.mark.parametrize(
    ("include", "skip", "text"),
    [(False, True, "ab"), (False, False, f"a{SPECIAL}b"), (True, True, "ab"), (True, False, f"a{SPECIAL}b{SPECIAL}")],
)
async def test_special_tokens_are_text_where_that_is_asked_for(include: bool, skip: bool, text: str) -> None:
    engine = says([*tokenizer().encode("a"), EOS, *tokenizer().encode("b"), EOS], "stop")
    answer = await everywhere(engine, max_tokens=9, include_stop_str_in_output=include, skip_special_tokens=skip)
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["completion_tokens"] == 4


async def test_a_stop_token_is_in_the_text_where_that_is_asked_for() -> None:
    (full_stop,) = tokenizer().encode(".")
    engine = says([*tokenizer().encode("a b"), full_stop], "stop")
    fields = {"max_tokens": 9, "stop_token_ids": [full_stop]}
    assert (await everywhere(engine, **fields))["choices"][0]["text"] == "a b"
    kept = (await everywhere(engine, **fields, include_stop_str_in_output=True))["choices"][0]
    assert (kept["text"], kept["stop_reason"]) == ("a b.", full_stop)


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, True, False])
async def test_special_tokens_are_added_to_texts_unless_they_are_not_wanted(wanted: bool | None) -> None:
    harness = Harness(spoken=tokenizer(adds_special_tokens=True))
    ids = tokenizer().encode("Hi")
    for prompt, expected in (("Hi", ids if wanted is False else [EOS, *ids]), (ids, ids)):
        assert (await harness.complete(prompt=prompt, add_special_tokens=wanted)).status_code == 200
        assert list(harness.engine.requests[-1].prompt_token_ids) == expected


@pytest.mark.parametrize("limit", [1, 3, 5, 6, 99, 10**30])
async def test_a_prompt_is_cut_to_its_last_tokens(limit: int) -> None:
    ids = tokenizer().encode("Hi, é😀")
    for prompt in ("Hi, é😀", ids):
        engine = says([70])
        answer = await everywhere(engine, prompt=prompt, truncate_prompt_tokens=limit, echo=True, max_tokens=1)
        kept = ids[-limit:]
        assert list(engine.requests[0].prompt_token_ids) == kept
        assert answer["usage"]["prompt_tokens"] == len(kept)
        assert answer["choices"][0]["text"] == tokenizer().decode(kept) + tokenizer().decode([70])


@pytest.mark.parametrize(("max_tokens", "kept"), [(None, 240), (1, 255), (100, 156), (255, 1), (0, 255)])
async def test_minus_one_keeps_what_there_is_room_for(max_tokens: int | None, kept: int) -> None:
    fields = {"max_tokens": max_tokens, "echo": True, "truncate_prompt_tokens": -1}
    for prompt in ([5] * 1000, "fox " * 50_000):
        answer = await whole(Harness(says([70])), prompt=prompt, **fields)
        assert answer["usage"]["prompt_tokens"] == kept


async def test_a_cut_that_is_longer_than_the_model_does_not_make_room() -> None:
    for prompt in ([5] * 1000, "fox " * 1000):
        response = await Harness().complete(prompt=prompt, truncate_prompt_tokens=256)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    response = await Harness().complete(max_tokens=256, truncate_prompt_tokens=-1)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


# --- what comes with the text ------------------------------------------------------------------------------------


async def test_token_ids_come_where_they_are_asked_for() -> None:
    ids = tokenizer().encode("a fox 😀 and a dog")
    engine = says(ids, sizes=(1, 3))
    answer = await everywhere(engine, prompt=[[40, 73], [5, 6]], max_tokens=99, return_token_ids=True)
    assert [choice["token_ids"] for choice in answer["choices"]] == [ids, ids]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[40, 73], [5, 6]]
    stopped = await everywhere(engine, max_tokens=99, return_token_ids=True, stop="fox")
    kept = stopped["choices"][0]["token_ids"]
    assert kept == ids[: len(kept)]
    assert len(kept) == stopped["usage"]["completion_tokens"] < len(ids)
    assert "token_ids" not in (await everywhere(engine, max_tokens=99))["choices"][0]


async def test_tokens_without_text_are_told_at_once_where_ids_are_asked_for() -> None:
    ids = tokenizer().encode("😀")
    assert len(ids) == 3
    harness = Harness(says(ids, sizes=(1,)))
    *chunks, _ = events((await harness.complete(stream=True, return_token_ids=True)).text)
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[token] for token in ids]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "", "😀"]
    assert [("prompt_token_ids" in chunk["choices"][0]) for chunk in chunks] == [True, False, False]


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("unit", ["block", "token"])
async def test_every_chunk_counts_what_was_generated_until_it(unit: str, include_usage: bool) -> None:
    ids = tokenizer().encode("a fox and 😀 dog")
    harness = Harness(says(ids, sizes=(2, 3)), stream_chunks=unit)
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    *chunks, _ = events((await harness.complete(stream=True, stream_options=options, n=2, max_tokens=99)).text)
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1] if include_usage else chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == len(tokenizer().encode("Hi"))
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        # As many tokens as the text so far has, and those of a character that is not whole yet.
        generated = sum(len(tokenizer().encode(text)) for text in texts.values())
        assert generated <= usage["completion_tokens"] <= generated + 2 * 3
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(ids)
    assert bool(chunks[-1]["choices"]) == (not include_usage)


async def test_with_a_chunk_a_token_the_count_goes_up_by_one() -> None:
    ids = tokenizer().encode("a fox and 😀 dog")
    harness = Harness(says(ids, sizes=(2, 3)), stream_chunks="token")
    options = {"continuous_usage_stats": True}
    *chunks, _ = events((await harness.complete(stream=True, stream_options=options, max_tokens=99)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == list(range(1, len(ids) + 1))


# --- all together ------------------------------------------------------------------------------------------------

pieces = st.sampled_from(["a", "é", "漢", "😀", SPECIAL, " fox", "\n"]).map(lambda text: tokenizer().encode(text))
answers = st.lists(st.one_of(pieces, st.integers(0, 319).map(lambda token: [token])), min_size=1, max_size=10)
prompts = st.one_of(st.text(alphabet="aé漢😀", max_size=4), st.lists(st.integers(0, 319), min_size=1, max_size=6))
fields_of_requests = st.fixed_dictionaries(
    {"prompt": st.one_of(prompts, st.lists(st.text(alphabet="aé😀", max_size=3), min_size=1, max_size=3))},
    optional={
        "n": st.integers(1, 3),
        "echo": st.booleans(),
        "stop": st.lists(st.text(alphabet="aé漢😀fo\ufffd<|", min_size=1, max_size=3), max_size=3),
        "min_tokens": st.integers(0, 4),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "truncate_prompt_tokens": st.sampled_from([-1, 1, 2, 5]),
        "return_token_ids": st.booleans(),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    answers, st.sampled_from(["stop", "length"]), st.lists(st.integers(1, 5), min_size=1, max_size=3),
    fields_of_requests,
)  # fmt: skip
async def test_a_stream_says_what_the_whole_answer_says_in_every_combination(
    parts: list[list[int]], ends: FinishReason, sizes: list[int], fields: dict[str, Any]
) -> None:
    ids = [token for part in parts for token in part]
    answer = await everywhere(says(ids, ends, sizes), max_tokens=100, **fields)
    if fields.get("return_token_ids") and not fields.get("stop"):
        assert all(choice["token_ids"] == ids for choice in answer["choices"])
