"""The prompts of a completion: from what the client sent to what the engine gets, and what an echo repeats."""

import re
from collections.abc import Sequence

from engine.tokenizer import Tokenizer
from engine.types import SEED_RANGE, EngineInfo, InvalidRequestError, SamplingParams
from engine.validation import validate_request
from server.choices import PreparedPrompt
from server.errors import invalid
from server.off_loop import off_loop_if_long
from server.protocol import CompletionRequest, Prompt, parse_prompts, show
from server.settings import ServeSettings

DEFAULT_MAX_TOKENS = 16
MAX_GROUP_TOKENS = 8 << 20
"""Prompt tokens of all answers to one request. They travel to the engine in one message, up to 5 bytes each."""


async def prepare_prompts(
    completion: CompletionRequest, info: EngineInfo, tokenizer: Tokenizer, settings: ServeSettings
) -> list[PreparedPrompt]:
    """Tokenise the prompts, cut them as the request says, and check them and the parameters against the model.

    Raises ApiError or InvalidRequestError.
    """
    prompts = parse_prompts(completion.prompt)
    _check_counts(completion, len(prompts), settings)
    longest = _longest_prompt(completion, info.max_length)
    for prompt in prompts:
        if isinstance(prompt, str):
            _refuse_if_far_too_long(prompt, tokenizer, longest, info.max_length)

    def encode() -> list[list[int]]:
        special = completion.add_special_tokens
        ids = [tokenizer.encode(one, add_special_tokens=special) if isinstance(one, str) else one for one in prompts]
        # An empty text begins as training texts do: after the end of another.
        return [one or [info.eos_token_id] for one in ids]

    token_ids = await off_loop_if_long(encode, _characters(prompts))
    kept = [ids if longest is None else ids[-longest:] for ids in token_ids]
    if sum(map(len, kept)) * completion.n > MAX_GROUP_TOKENS:
        raise invalid("prompt", f"the prompts times n are more than {MAX_GROUP_TOKENS} tokens; split the request")
    prepared = [_prepare_prompt(completion, ids, info, index, len(prompts)) for index, ids in enumerate(kept)]
    if not completion.echo:
        return prepared

    def echoes() -> list[str]:
        skip = completion.skip_special_tokens
        return [
            prompt
            if isinstance(prompt, str) and len(ids) == len(rest)
            else tokenizer.decode(rest, skip_special_tokens=skip)
            for prompt, ids, rest in zip(prompts, token_ids, kept, strict=True)
        ]

    texts = await off_loop_if_long(echoes, sum(map(len, kept)))
    return [prompt._replace(echo=text) for prompt, text in zip(prepared, texts, strict=True)]


def _check_counts(completion: CompletionRequest, prompts: int, settings: ServeSettings) -> None:
    if prompts * completion.n > settings.max_choices:
        param = "prompt" if prompts > settings.max_choices else "n"
        message = f"{prompts} prompts times n = {show(completion.n)} is more than the {settings.max_choices} answers"
        raise invalid(param, f"{message} allowed in one request")
    if len(completion.stop) > settings.max_stop_strings:
        message = f"stop holds {len(completion.stop)} strings; at most {settings.max_stop_strings} are allowed"
        raise invalid("stop", message)


def _longest_prompt(completion: CompletionRequest, max_length: int) -> int | None:
    """How many tokens at the end of each prompt are kept; None for all."""
    limit = completion.truncate_prompt_tokens
    if limit is None or limit > 0:
        return limit
    if limit != -1:
        message = "truncate_prompt_tokens has to be an integer of at least 1, or -1 for what there is room for"
        raise invalid("truncate_prompt_tokens", f"{message}, not {show(limit)}")
    wanted = DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens
    return max(1, max_length - max(1, wanted))


def _refuse_if_far_too_long(text: str, tokenizer: Tokenizer, longest: int | None, max_length: int) -> None:
    """Tokenising takes a core for seconds where a text has megabytes: not for one that cannot be served anyway."""
    fewest = tokenizer.fewest_tokens(text)
    if fewest >= max_length and (longest is None or longest >= max_length):
        message = f"the prompt has at least {fewest} tokens, but the model's length is {max_length} tokens"
        raise InvalidRequestError("prompt", f"{message}, prompt and answer together; shorten the prompt")


def _characters(prompts: Sequence[Prompt]) -> int:
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))


def _prepare_prompt(
    completion: CompletionRequest, token_ids: list[int], info: EngineInfo, index: int, prompts: int
) -> PreparedPrompt:
    params = _sampling_params(completion, room=info.max_length - len(token_ids))
    try:
        validate_request(token_ids, params, vocab_size=info.vocab_size, max_length=info.max_length)
    except InvalidRequestError as error:
        if prompts == 1 or error.param not in ("prompt", "max_tokens"):
            raise
        raise InvalidRequestError(error.param, f"prompt {index} of {prompts}: {error.message}") from None
    return PreparedPrompt(tuple(token_ids), params)


def _sampling_params(completion: CompletionRequest, room: int) -> SamplingParams:
    max_tokens = completion.max_tokens
    if max_tokens is None:
        # At least 1, so that a prompt without room is what gets the blame.
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, room))
    elif completion.echo_only:
        # Never submitted, but held to all other rules: the engine knows no answer without a token.
        if completion.min_tokens > 0:
            raise invalid("min_tokens", f"min_tokens is {show(completion.min_tokens)}, but max_tokens is 0")
        max_tokens = 1
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=completion.temperature,
        top_p=completion.top_p,
        top_k=0 if completion.top_k == -1 else completion.top_k,
        min_p=completion.min_p,
        seed=None if completion.seed is None else completion.seed % SEED_RANGE,
        stop=tuple(completion.stop),
        stop_token_ids=tuple(completion.stop_token_ids),
        ignore_eos=completion.ignore_eos,
        min_tokens=completion.min_tokens,
        presence_penalty=completion.presence_penalty,
        frequency_penalty=completion.frequency_penalty,
        repetition_penalty=completion.repetition_penalty,
        logit_bias=tuple((_token_id(token), bias) for token, bias in completion.logit_bias.items()),
        logprobs=completion.logprobs,
    )


def _token_id(key: str) -> int:
    """A key of logit_bias. Each id can be written in one way only, so no two keys are the same token."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key, re.ASCII):
        raise invalid("logit_bias", f"the keys of logit_bias have to be token ids, not {show(key)}")
    return int(key)
