"""Log-likelihoods over HTTP are those of the offline evaluation, whatever else the server does meanwhile."""

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from engine.llm import LLM
from tests.serving.server_process import ServerProcess

TEXTS = [
    "Once upon a time there was a naïve dog 😀.",
    "Tom and Sue went to the park. " * 20,
    "The",
    "She said: hello!\n\n",
]


def test_an_echo_adds_up_to_the_offline_score(server: ServerProcess) -> None:
    llm = LLM(device="cpu", dtype="float32", max_rows=1)
    token_ids = [llm.tokenizer.encode(text) for text in TEXTS]
    expected = llm.score(token_ids, progress=False)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def echo(max_tokens: int) -> list[openai.types.CompletionChoice]:
        return client.completions.create(
            model=llm.info.model, prompt=token_ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        ).choices

    with ThreadPoolExecutor(2) as pool:
        for max_tokens, choices in zip((0, 1), pool.map(echo, (0, 1)), strict=True):
            for ids, scores, choice in zip(token_ids, expected, choices, strict=True):
                assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
                first, *told = choice.logprobs.token_logprobs
                assert first is None
                assert len(told) == len(ids) - 1 + max_tokens
                assert math.fsum(told[: len(scores)]) == pytest.approx(math.fsum(scores), abs=1e-3)


def test_penalties_and_bias_change_greedy_answers_and_logprobs_tell(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    plain = client.completions.create(model=model, prompt="Once upon", max_tokens=12, temperature=0, logprobs=3)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None and logprobs.token_logprobs is not None
    assert [max(one.values()) for one in logprobs.top_logprobs] == logprobs.token_logprobs
    assert all(len(one) == 3 for one in logprobs.top_logprobs)
    changed = client.completions.create(
        model=model, prompt="Once upon", max_tokens=12, temperature=0, frequency_penalty=2, logit_bias={"259": -100}
    )
    assert changed.choices[0].text != plain.choices[0].text
    assert " a " not in changed.choices[0].text
