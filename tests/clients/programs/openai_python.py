"""openai for Python: sync, async, streamed, errors, many connections, and a busy server's 429."""

import asyncio
import json
import sys

import openai
from openai.types import Completion

PROMPT = "Once upon a time"
CONNECTIONS = 200


class Tally:
    """Tokens by the client's own figures."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = self.completions = 0

    def add(self, completion: Completion) -> Completion:
        """Count an answer by its usage."""
        assert completion.usage is not None
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        self.prompt_tokens += completion.usage.prompt_tokens
        self.generation_tokens += completion.usage.completion_tokens
        self.completions += 1
        return completion


def use_sync(client: openai.OpenAI, tally: Tally) -> None:
    """A seed gives one text, whole or streamed; a list of prompts and n give choices by prompt."""
    model = client.models.list().data[0].id
    whole = tally.add(client.completions.create(model=model, prompt=PROMPT, max_tokens=64, seed=5))
    chunks = list(
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=64, seed=5, stream=True, stream_options={"include_usage": True}
        )
    )
    tally.add(chunks[-1])
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    many = tally.add(client.completions.create(model=model, prompt=[PROMPT, "Tom"], n=2, max_tokens=8, temperature=0))
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text != many.choices[2].text
    told = tally.add(client.completions.create(model=model, prompt=PROMPT, max_tokens=8, logprobs=3, temperature=0))
    logprobs = told.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs and logprobs.token_logprobs and logprobs.tokens
    assert "".join(logprobs.tokens) == told.choices[0].text
    assert [max(one.values()) for one in logprobs.top_logprobs] == logprobs.token_logprobs
    print("sync: whole, streamed, lists with n, logprobs")


def meet_errors(client: openai.OpenAI) -> None:
    """Each status is the exception that the client has for it, with the field."""
    model = client.models.list().data[0].id
    for wrong in ({"max_tokens": 10**6}, {"temperature": 3}, {"top_p": 0}, {"n": 0}):
        try:
            # What is wrong on purpose fits none of the client's signatures.
            client.completions.create(model=model, prompt=PROMPT, **wrong)  # type: ignore[call-overload]
        except openai.BadRequestError as error:
            assert error.param in wrong, (error.param, wrong)
        else:
            raise AssertionError(f"{wrong} was taken")
    for call in (
        lambda: client.completions.create(model="another", prompt=PROMPT),
        lambda: client.models.retrieve("another"),
    ):
        try:
            call()
        except openai.NotFoundError as error:
            assert error.code == "model_not_found"
        else:
            raise AssertionError("another model was found")
    print("errors: BadRequestError with param, NotFoundError")


async def use_async(url: str, tally: Tally) -> None:
    """Many streams at once, on a connection each."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300) as client:
        model = (await client.models.list()).data[0].id

        async def stream(seed: int) -> str:
            text = ""
            chunks = await client.completions.create(
                model=model, prompt=PROMPT, max_tokens=12, seed=seed, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            async for chunk in chunks:
                text += "".join(choice.text for choice in chunk.choices)
                if chunk.usage is not None:
                    tally.add(chunk)
            return text

        texts = await asyncio.gather(*(stream(seed % 50) for seed in range(CONNECTIONS)))
    assert texts[:50] == texts[50:100]
    assert len(set(texts)) > 10
    print(f"async: {CONNECTIONS} streams at once, the same text for the same seed")


async def be_refused(url: str, tally: Tally) -> None:
    """More requests than the queue takes: the client waits as Retry-After says, and all are answered."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=20, timeout=300) as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(
            *(client.completions.create(model=model, prompt=PROMPT, max_tokens=60, seed=seed) for seed in range(12))
        )
    for answer in answers:
        tally.add(answer)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        asked = (client.completions.create(model=model, prompt=PROMPT, max_tokens=60) for _ in range(12))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Completion):
            tally.add(outcome)
        else:
            assert isinstance(outcome, openai.RateLimitError), outcome
            assert outcome.response.headers["retry-after"]
    assert any(isinstance(outcome, openai.RateLimitError) for outcome in outcomes)
    print("a full queue: RateLimitError without retries, every answer with them")


def main() -> None:
    """The figures, as the last line."""
    url, part = sys.argv[1] + "/v1", sys.argv[2]
    tally = Tally()
    if part == "busy":
        asyncio.run(be_refused(url, tally))
    else:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            use_sync(client, tally)
            meet_errors(client)
        asyncio.run(use_async(url, tally))
    print(json.dumps(vars(tally)))


if __name__ == "__main__":
    main()
