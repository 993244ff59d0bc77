"""litellm: whole, streamed, several prompts in one request, async, errors."""

import asyncio
import json
import sys
from typing import Any

import litellm

PROMPT = "Once upon a time"
TALLY = {"prompt_tokens": 0, "generation_tokens": 0, "completions": 0}


def add(usage: Any) -> None:
    """Count an answer by its usage."""
    TALLY["prompt_tokens"] += usage.prompt_tokens
    TALLY["generation_tokens"] += usage.completion_tokens
    TALLY["completions"] += 1


async def several_at_once(asked: dict[str, Any]) -> None:
    """Async completions, the same text for the same seed."""
    answers = await asyncio.gather(*(litellm.atext_completion(**asked, prompt=PROMPT, seed=7) for _ in range(4)))
    for answer in answers:
        add(answer.usage)
    assert len({answer.choices[0].text for answer in answers}) == 1
    print("async: the same text for the same seed")


def main() -> None:
    """The figures, as the last line."""
    litellm.suppress_debug_info = True
    asked: dict[str, Any] = {
        "model": "text-completion-openai/blockserve-stories",
        "api_base": sys.argv[1] + "/v1",
        "api_key": "none",
        "max_tokens": 24,
    }
    whole = litellm.text_completion(**asked, prompt=PROMPT, temperature=0)
    add(whole.usage)
    chunks = list(
        litellm.text_completion(
            **asked, prompt=PROMPT, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(choice.text or "" for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    (usage,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None) is not None]
    add(usage)
    print("whole and streamed: the same text, the same usage")
    several = litellm.text_completion(**asked, prompt=[PROMPT, "Tom and Sue", PROMPT], temperature=0)
    add(several.usage)
    texts = [choice.text for choice in several.choices]
    assert texts[0] == texts[2] == whole.choices[0].text != texts[1]
    print("several prompts: choices in their order")
    asyncio.run(several_at_once(asked))
    try:
        litellm.text_completion(**asked, prompt=PROMPT, temperature=3, max_retries=0)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of 3 was taken")
    print("errors: BadRequestError")
    print(json.dumps(TALLY))


if __name__ == "__main__":
    main()
