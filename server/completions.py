"""POST /v1/completions: from the request's body to the engine, and from its deltas to the response."""

import logging
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.client import Answers, EngineRejectedError, EngineUnavailableError
from engine.types import SEED_RANGE, Delta, EngineInfo, InvalidRequestError, SamplingParams
from engine.validation import validate_request
from server.answer_metrics import Outcome
from server.app_state import AppState
from server.choices import Choice, Piece, PreparedPrompt, make_choices
from server.disconnect import ClientGoneError, noticing, unless_disconnected
from server.errors import as_api_error, draining, generation_failed, internal, invalid, unavailable
from server.json_body import parse_json_object, read_body
from server.model_names import served_model
from server.off_loop import off_loop_if_long
from server.protocol import (
    ChoiceBody,
    CompletionBody,
    CompletionRequest,
    Prompt,
    Usage,
    parse_completion_request,
    parse_prompts,
    show,
)
from server.request_record import RequestRecord, record_of
from server.sse import DONE, STREAM_HEADERS, event

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 16
MAX_GROUP_TOKENS = 8 << 20
"""Prompt tokens of all answers to one request. They travel to the engine in one message, up to 5 bytes each."""


async def read_completion(request: Request, state: AppState) -> "CompletionResponse":
    """Read and check all of the request that can be checked without the engine. Raises ApiError."""
    if state.service.draining:
        raise draining()
    body = await read_body(request, state.settings.max_body_bytes)
    arrival = time.monotonic()
    record = record_of(request.scope)
    fields = parse_json_object(body)
    del body
    # First of all: whatever is wrong with the rest, the client finds its own id in the answer and the log.
    if isinstance(client_id := fields.get("request_id"), str):
        record.take_client_id(client_id)
    return CompletionResponse(state, record, parse_completion_request(fields), arrival)


class CompletionResponse(Response):
    """Answers one completion request, whole or as a stream.

    Nothing is sent before the engine has accepted the request: until then errors are raised (ApiError and what
    `server.errors.as_api_error` knows), later ones end the stream. However this ends, the engine is left with nothing
    of the request.
    """

    def __init__(self, state: AppState, record: RequestRecord, completion: CompletionRequest, arrival: float) -> None:
        super().__init__()
        self._state = state
        self._record = record
        self._completion = completion
        self._arrival = arrival
        self._model = served_model(state, completion.model)
        self._created = int(time.time())
        self._prompt_tokens = 0
        self._choices: list[Choice] = []
        self._outcome: Outcome = "abort"
        """Of the answers that do not come to their end."""
        record.fields |= {"model": self._model, "stream": completion.stream}
        if completion.user is not None:
            record.fields["user"] = completion.user

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; raises ClientGoneError if the client goes away first."""
        await unless_disconnected(receive, self._serve(scope, receive, noticing(send)))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        info = self._state.engine.info
        if info is None:
            raise unavailable("the model is still loading; try again in a moment")
        prompts = await self._prepare(info)
        # A drain may have begun while a large prompt was read.
        if self._state.service.draining:
            raise draining()
        self._choices = make_choices(
            prompts,
            self._completion.n,
            priority=self._completion.priority,
            tokenizer=self._state.tokenizer,
            recorder=self._state.metrics,
            next_request_id=self._state.engine.next_request_id,
            arrival=self._arrival,
        )
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._record.fields |= {"prompt_tokens": self._prompt_tokens, "choices": len(self._choices)}
        try:
            answers = await self._submit()
            try:
                await (
                    self._stream(answers, send)
                    if self._completion.stream
                    else self._whole(answers, scope, receive, send)
                )
            finally:
                answers.abort()
        finally:
            self._close()

    async def _prepare(self, info: EngineInfo) -> list[PreparedPrompt]:
        """Tokenise the prompts and check them and the parameters against the model."""
        prompts, n = parse_prompts(self._completion.prompt), self._completion.n
        settings = self._state.settings
        if len(prompts) * n > settings.max_choices:
            param = "prompt" if len(prompts) > settings.max_choices else "n"
            message = (
                f"{len(prompts)} prompts times n = {show(n)} is more than the {settings.max_choices} answers allowed"
            )
            raise invalid(param, f"{message} in one request")
        if len(self._completion.stop) > settings.max_stop_strings:
            raise invalid(
                "stop",
                f"stop holds {len(self._completion.stop)} strings; at most {settings.max_stop_strings} are allowed",
            )
        for prompt in prompts:
            if isinstance(prompt, str):
                self._refuse_if_far_too_long(prompt, info.max_length)
        token_ids = await self._encode(prompts, info.eos_token_id)
        if sum(map(len, token_ids)) * n > MAX_GROUP_TOKENS:
            raise invalid("prompt", f"the prompts times n are more than {MAX_GROUP_TOKENS} tokens; split the request")
        return [
            _prepare_prompt(self._completion, ids, info, index, len(prompts)) for index, ids in enumerate(token_ids)
        ]

    def _refuse_if_far_too_long(self, text: str, max_length: int) -> None:
        """Tokenising takes a core for seconds where a text has megabytes: not for one that cannot be served anyway."""
        fewest = self._state.tokenizer.fewest_tokens(text)
        if fewest >= max_length:
            message = f"the prompt has at least {fewest} tokens, but the model's length is {max_length} tokens"
            raise InvalidRequestError("prompt", f"{message}, prompt and answer together; shorten the prompt")

    async def _encode(self, prompts: Sequence[Prompt], eos_token_id: int) -> list[list[int]]:
        def encode() -> list[list[int]]:
            tokenizer = self._state.tokenizer
            ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
            # An empty text begins as training texts do: after the end of another.
            return [one or [eos_token_id] for one in ids]

        return await off_loop_if_long(encode, sum(len(prompt) for prompt in prompts if isinstance(prompt, str)))

    async def _submit(self) -> Answers:
        try:
            return await self._state.engine.submit([choice.request for choice in self._choices])
        except (EngineRejectedError, EngineUnavailableError):
            self._outcome = "rejected"
            raise

    async def _whole(self, answers: Answers, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for step in self._steps(answers, each_token=False):
                for choice, pieces in step:
                    choice.pieces += pieces
        except Exception:
            self._outcome = "error"
            raise
        bodies = []
        for choice in self._choices:
            text, last = "".join(piece.text for piece in choice.pieces), choice.pieces[-1]
            bodies.append(_choice_body(choice, Piece(text, last.finish_reason, last.stop_reason)))
        body = self._body(bodies, self._usage())
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, answers: Answers, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            each_token = self._state.settings.stream_chunks == "token"
            async for step in self._steps(answers, each_token=each_token):
                chunks = [
                    self._chunk(choice, piece)
                    for choice, pieces in step
                    for piece in pieces
                    if each_token or any(piece)
                ]
                if chunks:
                    await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - the status line is out: the stream has to carry whatever it was
            await self._end_with_error(error, send)
            return
        end = DONE
        if self._include_usage:
            end = event(self._body([], self._usage())) + end
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _end_with_error(self, error: Exception, send: Send) -> None:
        self._outcome = "error"
        told = as_api_error(error)
        if told is None:
            log.error("a stream failed", exc_info=error, extra={"id": self._record.id})
            told = internal(self._record.id)
        self._record.fields["error"] = told.detail.message
        await send({"type": "http.response.body", "body": event(told.body()) + DONE, "more_body": False})

    async def _steps(self, answers: Answers, *, each_token: bool) -> AsyncIterator[list[tuple[Choice, list[Piece]]]]:
        """What every step of the engine adds, until all answers have ended."""
        unfinished = {choice.request.request_id: choice for choice in self._choices}
        async for deltas in answers.deltas():
            now, step = time.monotonic(), []
            for delta in deltas:
                choice = unfinished.get(delta.request_id)
                if choice is None:
                    continue
                self._raise_if_failed(delta)
                step.append((choice, choice.take(delta, now, each_token=each_token)))
                if choice.finish_reason is not None:
                    del unfinished[delta.request_id]
                    if delta.finish_reason is None:
                        answers.abort([delta.request_id])
            yield step
            if not unfinished:
                return
        if unfinished:
            raise EngineUnavailableError("the engine stopped before the answer was complete; try again")

    def _raise_if_failed(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            raise generation_failed(delta.error or "generation failed", self._record.id)
        if delta.finish_reason == "abort":
            raise unavailable("the engine gave this request up; try again")

    @property
    def _include_usage(self) -> bool:
        options = self._completion.stream_options
        return options is not None and options.include_usage

    def _chunk(self, choice: Choice, piece: Piece) -> bytes:
        return event(self._body([_choice_body(choice, piece)], None if self._include_usage else msgspec.UNSET))

    def _body(self, choices: list[ChoiceBody], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return msgspec.json.encode(
            CompletionBody(
                id=f"cmpl-{self._record.id}", created=self._created, model=self._model, choices=choices, usage=usage
            )
        )

    def _usage(self) -> Usage:
        generated = sum(choice.tokens for choice in self._choices)
        return Usage(
            prompt_tokens=self._prompt_tokens, completion_tokens=generated, total_tokens=self._prompt_tokens + generated
        )

    def _close(self) -> None:
        """Count the answers that did not come to their end, and note what the log line says."""
        now = time.monotonic()
        for choice in self._choices:
            choice.metrics.ended(self._outcome, now)
        first = [s for choice in self._choices if (s := choice.metrics.seconds_to_first_token) is not None]
        reasons = {choice.finish_reason or self._outcome for choice in self._choices}
        self._record.fields |= {
            "completion_tokens": sum(choice.tokens for choice in self._choices),
            "outcome": ",".join(sorted(reasons)),
        }
        if first:
            self._record.fields["first_token_s"] = round(min(first), 6)


def _prepare_prompt(
    completion: CompletionRequest, token_ids: list[int], info: EngineInfo, index: int, prompts: int
) -> PreparedPrompt:
    max_tokens = completion.max_tokens
    if max_tokens is None:
        # At least 1, so that a prompt without room is what gets the blame.
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, info.max_length - len(token_ids)))
    params = SamplingParams(
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
    )
    try:
        validate_request(token_ids, params, vocab_size=info.vocab_size, max_length=info.max_length)
    except InvalidRequestError as error:
        if prompts == 1 or error.param not in ("prompt", "max_tokens"):
            raise
        raise InvalidRequestError(error.param, f"prompt {index} of {prompts}: {error.message}") from None
    return PreparedPrompt(tuple(token_ids), params)


def _choice_body(choice: Choice, piece: Piece) -> ChoiceBody:
    return ChoiceBody(
        index=choice.index, text=piece.text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
    )
