"""POST /v1/completions: from the request's body to the engine, and from its deltas to the response."""

import logging
import time
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.client import Answers, EngineRejectedError, EngineUnavailableError
from engine.text_stream import TextStream
from engine.types import Delta, SamplingParams
from server.answer_metrics import Outcome
from server.app_state import AppState
from server.choices import Choice, Piece, PromptScore, make_choices
from server.disconnect import ClientGoneError, noticing, unless_disconnected
from server.echo import EchoAnswers
from server.errors import as_api_error, draining, generation_failed, internal, invalid, unavailable
from server.http_protocol import hang_up
from server.json_body import parse_json_object, read_body
from server.logprobs import LogprobsWriter, join, prompt_logprobs
from server.model_names import served_model
from server.prompts import prepare_prompts
from server.protocol import (
    ChoiceBody,
    CompletionBody,
    CompletionRequest,
    PromptTokensDetails,
    Usage,
    parse_completion_request,
)
from server.request_record import RequestRecord, record_of
from server.sse import DONE, STREAM_HEADERS, event

log = logging.getLogger(__name__)


async def read_completion(request: Request, state: AppState, *, may_stream: bool = True) -> "CompletionResponse":
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
    completion = parse_completion_request(fields)
    if completion.stream and not may_stream:
        raise invalid("stream", "stream has to be false: here an answer is one whole")
    return CompletionResponse(state, record, completion, arrival)


class CompletionResponse(Response):
    """Answers one completion request, whole or as a stream.

    Nothing is sent before the engine has accepted the request: until then errors are raised (ApiError and what
    `server.errors.as_api_error` knows), later ones end the stream. However this ends, the engine is left with nothing
    of the request. An echo of the prompt alone is answered without the engine.
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
        self._streamed_tokens = 0
        self._choices: list[Choice] = []
        self._scores: dict[int, PromptScore] = {}
        """Those that are not there yet, by request id."""
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
        prompts = await prepare_prompts(self._completion, info, self._state.tokenizer, self._state.settings)
        # A drain may have begun while a large prompt was read.
        if self._state.service.draining:
            raise draining()
        self._choices = make_choices(
            prompts,
            self._completion.n,
            priority=self._completion.priority,
            cache_salt=self._completion.cache_salt or "",
            score_top=self._completion.score_top,
            new_stream=self._new_text_stream,
            new_logprobs=self._new_logprobs_writer,
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
                    self._stream(answers, scope, send)
                    if self._completion.stream
                    else self._whole(answers, scope, receive, send)
                )
            finally:
                answers.abort()
        finally:
            self._close()

    def _new_text_stream(self, params: SamplingParams) -> TextStream:
        return TextStream(
            self._state.tokenizer,
            params,
            skip_special_tokens=self._completion.skip_special_tokens,
            include_stop=self._completion.include_stop_str_in_output,
        )

    def _new_logprobs_writer(self) -> LogprobsWriter | None:
        if self._completion.logprobs is None:
            return None
        return LogprobsWriter(self._state.tokenizer, skip_special_tokens=self._completion.skip_special_tokens)

    async def _submit(self) -> Answers:
        requests = [choice.request for choice in self._choices]
        # One a prompt, whatever n is.
        self._scores = {c.score.request.request_id: c.score for c in self._choices if c.score is not None}
        scores = [score.request for score in self._scores.values()]
        if self._completion.echo_only and not scores:
            return EchoAnswers(requests)
        try:
            if self._completion.echo_only:
                return EchoAnswers(requests, await self._state.engine.submit([], scores))
            return await self._state.engine.submit(requests, scores)
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
            token_ids = tuple(token for piece in choice.pieces for token in piece.token_ids)
            logprobs = tuple(one for piece in choice.pieces for one in piece.logprobs)
            joined = last._replace(text=text, token_ids=token_ids, logprobs=logprobs)
            bodies.append(self._choice_body(choice, joined))
        body = self._body(bodies, self._usage(self._generated_tokens))
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, answers: Answers, scope: Scope, send: Send) -> None:
        answers.limit_unread(self._state.settings.max_unread, lambda: self._hang_up(scope))
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            each_token = self._state.settings.stream_chunks == "token"
            async for step in self._steps(answers, each_token=each_token):
                if chunks := self._chunks(step, each_token=each_token):
                    await send({"type": "http.response.body", "body": chunks, "more_body": True})
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - the status line is out: the stream has to carry whatever it was
            await self._end_with_error(error, send)
            return
        end = DONE
        if self._include_usage:
            end = event(self._body([], self._usage(self._generated_tokens))) + end
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _hang_up(self, scope: Scope) -> None:
        """The client is too far behind. Handled as gone from here: an error would reach it behind all the rest."""
        self._record.fields["error"] = "the client is too far behind"
        hang_up(scope)

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
                if (score := self._scores.pop(delta.request_id, None)) is not None:
                    self._raise_if_failed(delta)
                    score.logprobs = delta.logprobs
                    step += [(choice, choice.release([])) for choice in self._choices if choice.score is score]
                choice = unfinished.get(delta.request_id)
                if choice is None:
                    continue
                self._raise_if_failed(delta)
                step.append((choice, choice.release(choice.take(delta, now, each_token=each_token))))
                if choice.finish_reason is not None:
                    del unfinished[delta.request_id]
                    if delta.finish_reason is None:
                        answers.abort([delta.request_id])
            yield step
            if not unfinished and not self._scores:
                return
        if unfinished or self._scores:
            raise EngineUnavailableError("the engine stopped before the answer was complete; try again")

    def _raise_if_failed(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            raise generation_failed(delta.error or "generation failed", self._record.id)
        if delta.finish_reason == "abort":
            raise unavailable("the engine gave this request up; try again")

    @property
    def _generated_tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    @property
    def _include_usage(self) -> bool:
        options = self._completion.stream_options
        return options is not None and options.include_usage

    @property
    def _continuous_usage(self) -> bool:
        options = self._completion.stream_options
        return options is not None and options.continuous_usage_stats

    def _chunks(self, step: list[tuple[Choice, list[Piece]]], *, each_token: bool) -> bytes:
        chunks = []
        for choice, pieces in step:
            for piece in pieces:
                # Tokens may have no text yet, or none at all. They count all the same, and some are told.
                self._streamed_tokens += len(piece.token_ids)
                told = piece.logprobs or (self._completion.return_token_ids and piece.token_ids)
                if each_token or told or piece.text or piece.finish_reason is not None:
                    chunks.append(self._chunk(choice, piece))
        return b"".join(chunks)

    def _chunk(self, choice: Choice, piece: Piece) -> bytes:
        usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
        if self._continuous_usage:
            usage = self._usage(self._streamed_tokens)
        elif self._include_usage:
            usage = None
        return event(self._body([self._choice_body(choice, piece)], usage))

    def _choice_body(self, choice: Choice, piece: Piece) -> ChoiceBody:
        body = ChoiceBody(
            index=choice.index, text=piece.text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
        )
        if not choice.begun:
            choice.begun = True
            body = self._with_prompt(choice, body)
        if choice.logprobs is not None:
            logprobs = choice.logprobs.write(piece.token_ids, piece.logprobs)
            body = msgspec.structs.replace(body, logprobs=join(body.logprobs, logprobs) if body.logprobs else logprobs)
        if self._completion.return_token_ids:
            body = msgspec.structs.replace(body, token_ids=piece.token_ids)
        return body

    def _with_prompt(self, choice: Choice, body: ChoiceBody) -> ChoiceBody:
        """What is told of the prompt, with the first that goes out."""
        prompt, completion = choice.request.prompt_token_ids, self._completion
        if completion.return_token_ids:
            body = msgspec.structs.replace(body, prompt_token_ids=prompt)
        told = None if choice.score is None else choice.score.logprobs
        if told is None:
            return body
        if completion.prompt_logprobs is not None:
            entries = prompt_logprobs(self._state.tokenizer, prompt, told, completion.prompt_logprobs)
            body = msgspec.structs.replace(body, prompt_logprobs=entries)
        if completion.echo and completion.logprobs is not None and choice.logprobs is not None:
            logprobs = choice.logprobs.write_prompt(prompt, told, completion.logprobs, choice.echo_length)
            body = msgspec.structs.replace(body, logprobs=logprobs)
        return body

    def _body(self, choices: list[ChoiceBody], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return msgspec.json.encode(
            CompletionBody(
                id=f"cmpl-{self._record.id}", created=self._created, model=self._model, choices=choices, usage=usage
            )
        )

    def _usage(self, generated: int) -> Usage:
        # A prompt counts once: the answers to it behind the first find what that one has computed.
        cached = sum(choice.cached_tokens for choice in self._choices[:: self._completion.n])
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached),
        )

    def _close(self) -> None:
        """Count the answers that did not come to their end, and note what the log line says."""
        now = time.monotonic()
        for choice in self._choices:
            choice.metrics.ended(self._outcome, now)
        first = [s for choice in self._choices if (s := choice.metrics.seconds_to_first_token) is not None]
        reasons = {choice.finish_reason or self._outcome for choice in self._choices}
        self._record.fields |= {
            "completion_tokens": self._generated_tokens,
            "outcome": ",".join(sorted(reasons)),
        }
        if first:
            self._record.fields["first_token_s"] = round(min(first), 6)
