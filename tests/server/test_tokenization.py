"""POST /tokenize, POST /detokenize, GET /tokenizer_info."""

import threading
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import pytest

from tests.engine.tokenizers_of_tests import CORPUS, END_OF_TEXT
from tests.server.fakes import EOS, INFO, Harness, tokenizer
from tests.server.test_hostile_requests import is_envelope


async def post(path: str, harness: Harness | None = None, **fields: Any) -> httpx.Response:
    async with (harness or Harness()).client() as client:
        return await client.post(path, json=fields)


@pytest.mark.parametrize("text", ["", *CORPUS])
async def test_text_comes_back_through_its_tokens(text: str) -> None:
    answer = await post("/tokenize", prompt=text)
    ids = tokenizer().encode(text)
    assert answer.json() == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    assert (await post("/detokenize", tokens=ids)).json() == {"prompt": text}


async def test_a_special_token_comes_back_too() -> None:
    text = f"a{END_OF_TEXT}b"
    tokens = (await post("/tokenize", prompt=text, model="fox-alias")).json()["tokens"]
    assert tokens.count(EOS) == 1
    assert (await post("/detokenize", tokens=tokens, model="fox-alias")).json() == {"prompt": text}


async def test_token_strings_are_those_of_the_vocabulary() -> None:
    answer = (await post("/tokenize", prompt=" hello é", return_token_strs=True)).json()
    assert len(answer["token_strs"]) == answer["count"]
    assert "".join(answer["token_strs"]) == "ĠhelloĠÃ©"


@pytest.mark.parametrize("choice", [None, True, False])
async def test_special_tokens_are_added_unless_they_are_not_wanted(choice: bool | None) -> None:
    answer = await post("/tokenize", Harness(spoken=tokenizer(adds_special_tokens=True)), prompt="Hi",
                        add_special_tokens=choice)  # fmt: skip
    expected = tokenizer().encode("Hi")
    assert answer.json()["tokens"] == (expected if choice is False else [EOS, *expected])


@pytest.mark.parametrize(("times", "here"), [(1, True), (8000, False)])
async def test_a_long_text_and_many_tokens_are_left_to_a_thread(
    times: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, harness, threads = "the fox " * times, Harness(), []
    spoken = harness.state.tokenizer
    encode, decode = spoken.encode, spoken.decode

    def recording_encode(text: str, *, add_special_tokens: bool) -> list[int]:
        threads.append(threading.get_ident())
        return encode(text, add_special_tokens=add_special_tokens)

    def recording_decode(token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        threads.append(threading.get_ident())
        return decode(token_ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(spoken, "encode", recording_encode)
    monkeypatch.setattr(spoken, "decode", recording_decode)
    tokens = (await post("/tokenize", harness, prompt=text)).json()["tokens"]
    assert (await post("/detokenize", harness, tokens=tokens)).json()["prompt"] == text
    assert [thread == threading.get_ident() for thread in threads] == [here, here]


async def test_ids_that_only_the_model_has_stand_for_nothing() -> None:
    harness = Harness()
    harness.engine.info = msgspec.structs.replace(INFO, vocab_size=512)
    assert (await post("/detokenize", harness, tokens=[*tokenizer().encode("a"), 511])).json() == {"prompt": "a"}
    assert (await post("/detokenize", harness, tokens=[512])).status_code == 400


async def test_without_an_engine_the_tokenizer_is_there() -> None:
    harness = Harness()
    harness.engine.info = None
    assert (await post("/tokenize", harness, prompt="Hi")).json()["max_model_len"] is None
    assert (await post("/detokenize", harness, tokens=[5])).status_code == 200
    async with harness.client() as client:
        assert (await client.get("/tokenizer_info")).json()["max_model_len"] is None


async def test_the_tokenizer_says_what_its_special_tokens_are() -> None:
    async with Harness().client() as client:
        answer = await client.get("/tokenizer_info")
    assert answer.json() == {
        "eos_token": END_OF_TEXT, "eos_token_id": EOS, "bos_token": None, "pad_token": None, "unk_token": None,
        "vocab_size": 320, "max_model_len": 256, "chat_template": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", b"{", 400, None),
        ("/tokenize", b"{}", 400, "prompt"),
        ("/tokenize", b'{"prompt": null}', 400, "prompt"),
        ("/tokenize", b'{"prompt": ["Hi"]}', 400, "prompt"),
        ("/tokenize", b'{"prompt": [5]}', 400, "prompt"),
        ("/tokenize", b'{"prompt": "\\ud800"}', 400, "prompt"),
        ("/tokenize", b'{"prompt": "Hi", "add_special_tokens": 1}', 400, "add_special_tokens"),
        ("/tokenize", b'{"prompt": "Hi", "return_token_strs": "yes"}', 400, "return_token_strs"),
        ("/tokenize", b'{"prompt": "Hi", "messages": []}', 400, "messages"),
        ("/tokenize", b'{"prompt": "Hi", "model": "other"}', 404, "model"),
        ("/tokenize", b'{"prompt": "Hi", "model": 5}', 400, "model"),
        ("/tokenize", b'{"prompt": "' + b"x" * 5000 + b'"}', 413, None),
        ("/detokenize", b"{}", 400, "tokens"),
        ("/detokenize", b'{"tokens": 5}', 400, "tokens"),
        ("/detokenize", b'{"tokens": "5"}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [-1]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [320]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [4294967296]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [5, 1.0]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [5, true]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [5, null]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [[5]]}', 400, "tokens"),
        ("/detokenize", b'{"tokens": [5], "prompt": "Hi"}', 400, "prompt"),
        ("/detokenize", b'{"tokens": [5], "model": "other"}', 404, "model"),
        ("/detokenize", b'{"tokens": [' + b"5," * 3000 + b"5]}", 413, None),
    ],
    ids=lambda value: value[:40].decode() if isinstance(value, bytes) else str(value),
)
async def test_what_is_wrong_is_named(path: str, body: bytes, status: int, param: str | None) -> None:
    async with Harness(max_body_bytes=4096).client() as client:
        answer = await client.post(path, content=body)
    assert answer.status_code == status, answer.text
    assert is_envelope(answer.json())
    assert answer.json()["error"]["param"] == param
