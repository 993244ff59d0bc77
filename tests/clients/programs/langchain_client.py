"""langchain-openai: one prompt, several in one request, streamed; token_usage as it tells it."""

import json
import sys
from typing import Any

from langchain_openai import OpenAI
from pydantic import SecretStr

PROMPT = "Once upon a time"


def main() -> None:
    """The figures, as the last line."""
    url = sys.argv[1] + "/v1"
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "seed": 1}
    llm = OpenAI(base_url=url, api_key=SecretStr("none"), model="blockserve-stories", **options)
    tally = {"prompt_tokens": 0, "generation_tokens": 0, "completions": 0}

    def generate(prompts: list[str]) -> list[str]:
        result = llm.generate(prompts)
        usage = (result.llm_output or {})["token_usage"]
        tally["prompt_tokens"] += usage["prompt_tokens"]
        tally["generation_tokens"] += usage["completion_tokens"]
        tally["completions"] += 1
        return [answers[0].text for answers in result.generations]

    (text,) = generate([PROMPT])
    one = dict(tally)
    assert len(text.split()) > 5
    # In one request, in the order of the prompts.
    several = generate([PROMPT, "Tom and Sue", PROMPT])
    assert several[0] == several[2] == text != several[1]
    print("generate: one prompt, several in one request")
    # These give texts without figures: each asks again what has its figures above.
    assert "".join(llm.stream(PROMPT)) == text
    assert llm.invoke(PROMPT) == text
    print("stream, invoke: the same text")
    tally = {key: figure + 2 * one[key] for key, figure in tally.items()}
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
