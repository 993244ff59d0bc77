"""What schemathesis checks here besides its own: the rules of a stream, of usage and of errors.

Half of the valid completions are made servable first: what a schema cannot say (that ids are in the vocabulary, that
best_of equals n, that lengths fit) they keep to then, and have to be answered.
"""

import json
from typing import Any

import schemathesis

COMPLETIONS = "POST /v1/completions"
VOCABULARY = 4096


def servable(body: dict[str, Any]) -> dict[str, Any]:
    """The fields, within the rules between them."""
    fields = {
        key: value for key, value in body.items() if key not in ("model", "best_of", "suffix") and value is not None
    }
    fields["prompt"] = _short(fields["prompt"])
    fields["n"] = min(fields.get("n", 1), 3)
    fields["max_tokens"] = max(fields.get("max_tokens", 16) % 24, 0 if fields.get("echo") else 1)
    if "min_tokens" in fields:
        fields["min_tokens"] %= fields["max_tokens"] + 1
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = [int(token) % VOCABULARY for token in fields["stop_token_ids"]]
    if "stop" in fields and isinstance(fields["stop"], list):
        fields["stop"] = fields["stop"][:16]
    if "logit_bias" in fields:
        fields["logit_bias"] = {str(int(key) % VOCABULARY): value for key, value in fields["logit_bias"].items()}
    if not fields.get("stream"):
        fields.pop("stream_options", None)
    return {key: int(value) if _is_whole(value) else value for key, value in fields.items()}


def _is_whole(value: object) -> bool:
    """Whether the number, a float by its form, is an integer for a schema, which is more than the server takes."""
    return isinstance(value, float) and value.is_integer() and abs(value) < 1 << 63


def _short(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt[:200]
    if isinstance(prompt, list):
        return [int(one) % VOCABULARY if isinstance(one, int | float) else _short(one) for one in prompt[:4]]
    return prompt


def is_made_servable(case: Any) -> bool:
    """Whether the case is a valid completion, of those that are made servable."""
    if case.operation.label != COMPLETIONS or case.meta is None or not case.meta.generation.mode.is_positive:
        return False
    return isinstance(case.body, dict) and len(json.dumps(case.body)) % 2 == 0


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Make half of the valid completions servable."""
    if is_made_servable(case):
        case.body = servable(case.body) | {"user": "servable"}


@schemathesis.check
def servable_requests_are_served(ctx: Any, response: Any, case: Any) -> None:
    """What keeps to the schema and to the rules between fields is answered."""
    if isinstance(case.body, dict) and case.body.get("user") == "servable":
        assert response.status_code == 200, response.text


@schemathesis.check
def statuses_are_those_of_the_contract(ctx: Any, response: Any, case: Any) -> None:
    """No other status leaves, pydantic's 422 least of all; and an error is in the envelope, with its type."""
    assert response.status_code in (200, 400, 404, 405, 413, 415, 429, 503), response.status_code
    if response.status_code != 200 and response.content:
        error = json.loads(response.content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and "Traceback" not in error["message"]


@schemathesis.check
def answers_keep_their_rules(ctx: Any, response: Any, case: Any) -> None:
    """Choices are those asked for, each ends once; usage adds up; a stream has one id, and ends with [DONE]."""
    if case.operation.label != COMPLETIONS or response.status_code != 200:
        return
    asked = case.body
    streamed = response.headers["content-type"][0].startswith("text/event-stream")
    assert streamed == bool(asked.get("stream")), "a stream that was not asked for, or none"
    if streamed and response.stream_cut_short:
        # Longer than schemathesis reads: the server sees a client that leaves.
        return
    bodies = _events(response.content) if streamed else [json.loads(response.content)]
    assert "error" not in bodies[-1], f"the stream ended with {bodies[-1]}"
    assert len({body["id"] for body in bodies}) == 1, "more than one id"
    choices = [choice for body in bodies for choice in body["choices"]]
    ended = sorted(choice["index"] for choice in choices if choice["finish_reason"] is not None)
    wanted = list(range(_prompts(asked["prompt"]) * int(asked.get("n") or 1)))
    assert ended == wanted, f"choices {ended} ended, not {wanted}"
    last = {choice["index"]: choice["finish_reason"] for choice in choices}
    assert None not in last.values(), "a choice goes on after its end"
    for usage in (body["usage"] for body in bodies if body.get("usage")):
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], f"{usage} does not add up"
    options = asked.get("stream_options") or {}
    told = bodies[-1]["choices"] == [] if streamed else "usage" in bodies[-1]
    assert told == bool(options.get("include_usage") if streamed else True), "usage where it was not asked for, or none"


def _events(content: bytes) -> list[dict[str, Any]]:
    *events, rest = content.decode("utf-8").split("\n\n")
    assert rest == "" and events.pop() == "data: [DONE]", "the stream does not end with [DONE]"
    assert all(event.startswith("data: {") for event in events), "an event is not data"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def _prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
