"""The clients people use, unmodified, against the real server."""

import asyncio
import json
import shutil
import subprocess

import httpx
import openai
import pytest
from langchain_openai import OpenAI as LangChainOpenAI
from pydantic import SecretStr

from tests.serving.server_process import ServerProcess

PROMPT = "Once upon a time"
MODEL = "blockserve-stories"


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    """The openai client, as its users make it."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_story(server: ServerProcess) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 40, "temperature": 0})
    command = ["curl", "-sSf", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert len(answer["choices"][0]["text"].split()) > 10
    assert answer["usage"]["completion_tokens"] == 40


def test_openai_sync_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=64, seed=5, temperature=0.8)
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=64, seed=5, temperature=0.8, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]


async def test_openai_async_many_at_once(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, seed=seed, n=2) for seed in range(8))
        )
    assert all([choice.index for choice in answer.choices] == [0, 1] for answer in answers)
    # Choice i uses seed + i: choice 1 of one request is choice 0 of the next.
    assert all(a.choices[1].text == b.choices[0].text for a, b in zip(answers, answers[1:], strict=False))


def test_openai_errors_are_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10**6)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt=PROMPT)


def test_openai_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_langchain_gets_and_streams_a_story(server: ServerProcess) -> None:
    llm = LangChainOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("none"), model=MODEL, max_tokens=24, temperature=0, seed=1
    )
    text = llm.invoke(PROMPT)
    assert len(text.split()) > 5
    assert "".join(llm.stream(PROMPT)) == text
    assert llm.batch([PROMPT, PROMPT + " there"])[0] == text


def test_head_works_wherever_get_does(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models"):
        assert httpx.head(server.url + path).status_code == httpx.get(server.url + path).status_code == 200
