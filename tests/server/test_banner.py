"""What a person sees when the server is ready."""

import json
import shlex

import pytest
from msgspec import structs

from server.banner import start_banner
from tests.fakes.child import INFO

URL = "http://127.0.0.1:8000"


def test_it_names_model_device_capacity_rows_and_address() -> None:
    text = start_banner(INFO, "stories", "1.2.3", URL)
    for part in ("1.2.3", "stories", "cpu", "float32", "512 tokens in 16 pages", "1 MiB", "8 requests", URL):
        assert part in text


def test_it_says_how_many_engines_there_are_if_several() -> None:
    assert "engines   2, each" in start_banner(INFO, "stories", "1.2.3", URL, engines=2)
    assert "engines" not in start_banner(INFO, "stories", "1.2.3", URL)


def test_its_first_request_can_be_pasted() -> None:
    text = start_banner(INFO, "stories", "1.2.3", URL)
    command = shlex.split(text[text.index("curl") :].replace("\\\n", " "))
    assert command[:3] == ["curl", "-N", URL + "/v1/completions"]
    body = json.loads(command[command.index("-d") + 1])
    assert body["stream"] is True
    assert body["prompt"]


def test_its_first_request_takes_the_key_from_the_shell() -> None:
    text = start_banner(INFO, "stories", "1.2.3", URL, needs_key=True)
    command = shlex.split(text[text.index("curl") :].replace("\\\n", " "))
    assert "Authorization: Bearer $BLOCKSERVE_API_KEY" in command
    assert "Authorization" not in start_banner(INFO, "stories", "1.2.3", URL)


@pytest.mark.parametrize(("number", "words"), [(999, "999 "), (10_400_000, "10.4M "), (1_200_000_000, "1.2B ")])
def test_parameters_are_counted_in_words(number: int, words: str) -> None:
    info = type(INFO)(**{**{f: getattr(INFO, f) for f in INFO.__struct_fields__}, "parameters": number})
    assert f"({words}parameters" in start_banner(info, "m", "1", URL)


@pytest.mark.parametrize(("block_length", "words"), [(4, "4 tokens a block)"), (1, "token by token)")])
def test_it_says_how_much_the_model_writes_at_once(block_length: int, words: str) -> None:
    assert words in start_banner(structs.replace(INFO, block_length=block_length), "m", "1", URL)
