"""The offline API: a model and its engine core in this process, without a server."""

import secrets
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.config import ModelConfig
from engine.core import EngineCore
from engine.evaluate import DocumentScore, cut_windows, window_score
from engine.model_files import find_model, model_name
from engine.options import resolve_options
from engine.process_config import EngineOptions
from engine.score_layout import window_length
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer
from engine.types import (
    SEED_RANGE,
    Delta,
    EngineInfo,
    GenerationRequest,
    InvalidRequestError,
    SamplingParams,
    ScoreRequest,
    pack_tokens,
)
from engine.validation import validate_request

Prompt = str | Seq[int]


@dataclass(frozen=True)
class Completion:
    """One finished answer.

    `finish_reason` is "stop" (end of text; or a stop token or string, which `stop_reason` then names), "length" or
    "error".
    """

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None


@dataclass
class _Open:
    """An answer under way."""

    index: int
    prompt: Prompt
    request: GenerationRequest
    stream: TextStream
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def take(self, delta: Delta) -> tuple[str, Completion | None]:
        """New text, and the completion if this ended it."""
        update = self.stream.push(delta.token_ids, delta.finish_reason)
        self.text.append(update.text)
        self.token_ids += delta.token_ids[: update.tokens]
        reason: str | None = delta.finish_reason
        stop_reason: int | str | None = delta.stop_reason
        if update.stop is not None:
            reason, stop_reason = "stop", update.stop
        if reason is None:
            return update.text, None
        completion = Completion(
            self.prompt, self.request.prompt_token_ids, "".join(self.text), tuple(self.token_ids), reason, stop_reason
        )
        return update.text, completion


class LLM:
    """Generates text in this process.

        llm = LLM()
        for answer in llm.generate(["Once upon a time"], SamplingParams(max_tokens=100, seed=0)):
            print(answer.text)

    `model` is a directory or a hub id; None is the embedded model. `options` are the fields of
    `engine.process_config.EngineOptions`, each None for automatic. Raises ConfigError if the model cannot be served.
    """

    def __init__(self, model: str | None = None, *, random_seed: int | None = None, **options: Any) -> None:
        directory = find_model(model)
        model_config = ModelConfig.load(directory)
        config = resolve_options(EngineOptions(**options), model_config)
        self.tokenizer = Tokenizer.load(directory)
        self._core = EngineCore.load(model_name(model), directory, config, random_seed)
        self._max_waiting = config.max_waiting
        self._next_id = 0
        self._model_config = model_config

    @property
    def info(self) -> EngineInfo:
        """What is served, and how much of it fits."""
        return self._core.info

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """Answer every prompt (text or token ids), in the order given.

        `params` is one for all or one each. Raises InvalidRequestError naming the prompt before anything is generated.
        """
        pending = self._prepare(prompts, params)
        answers: list[Completion | None] = [None] * len(pending)
        with self._progress(disable=not progress) as bar, closing(self._run(pending)) as updates:
            task, tokens = bar.add_task("generating", total=len(pending), tokens=0), 0
            for opened, update in updates:
                text_and_end = opened.take(update)
                tokens += len(update.token_ids)
                if text_and_end[1] is not None:
                    self._core.abort(opened.request.request_id)
                    answers[opened.index] = text_and_end[1]
                    bar.advance(task)
                bar.update(task, tokens=tokens)
        return [answer for answer in answers if answer is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str]:
        """Yield the answer's text as it is written, a block at a time."""
        # Closed here: not every Python closes what the frame of a closed generator iterates over.
        with closing(self._run(self._prepare([prompt], params))) as updates:
            for opened, update in updates:
                text, end = opened.take(update)
                if text:
                    yield text
                if end is not None:
                    self._core.abort(opened.request.request_id)

    def score(self, texts: Seq[Seq[int]], *, padding: int | None = None, progress: bool = True) -> list[list[float]]:
        """The logprob of every token of each text (token ids) but its first, in nats.

        With `padding` pads in front, fewer than a block, those of the first block's tokens are missing.

        Raises InvalidRequestError for a text that cannot be scored, and MemoryError where the device has no room.
        """
        ids = range(self._next_id, self._next_id + len(texts))
        requests = [
            ScoreRequest(request_id=request_id, text=pack_tokens(text), padding=padding)
            for request_id, text in zip(ids, texts, strict=True)
        ]
        self._next_id += len(requests)
        places = {request.request_id: index for index, request in enumerate(requests)}
        scores: list[list[float]] = [[] for _ in texts]
        waiting = iter(requests)
        try:
            with self._progress(disable=not progress) as bar:
                task, tokens = bar.add_task("scoring", total=len(texts), tokens=0), 0
                self._feed_scores(waiting)
                while self._core.has_work:
                    report = self._core.step()
                    for _, delta in report.scored if report else ():
                        if delta.error is not None:
                            raise MemoryError(delta.error)
                        scores[places[delta.request_id]] = [one.logprob for one in delta.logprobs]
                        tokens += len(delta.logprobs)
                        bar.update(task, advance=1, tokens=tokens)
                    self._feed_scores(waiting)
        finally:
            for request_id in places:
                self._core.abort(request_id)
        return scores

    def evaluate(
        self, documents: Seq[str], *, padding: int | None = None, progress: bool = True
    ) -> list[DocumentScore]:
        """How well the model predicts each document (`engine.evaluate`); `padding` as `score` has it."""
        windows: list[list[int]] = []
        owners: list[int] = []
        for number, document in enumerate(documents):
            token_ids = self.tokenizer.encode(document, add_special_tokens=False)
            cut = cut_windows(token_ids, window_length(self._model_config, padding), self.info.eos_token_id)
            windows += cut
            owners += [number] * len(cut)
        scores = [DocumentScore() for _ in documents]
        told = self.score(windows, padding=padding, progress=progress)
        for owner, token_ids, logprobs in zip(owners, windows, told, strict=True):
            scores[owner].add(window_score(token_ids, logprobs, self.tokenizer))
        return scores

    def _feed_scores(self, waiting: Iterator[ScoreRequest]) -> None:
        while self._core.load_now.waiting < self._max_waiting and (request := next(waiting, None)) is not None:
            self._core.add([], [(request.request_id, request)])

    def _prepare(
        self, prompts: Prompt | Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None
    ) -> list[_Open]:
        listed = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each: Seq[SamplingParams] = [params or SamplingParams()] * len(listed)
        else:
            each = params
        if len(each) != len(listed):
            raise InvalidRequestError("params", f"{len(each)} params were given for {len(listed)} prompts")
        return [self._open(index, prompt, each[index]) for index, prompt in enumerate(listed)]

    def _open(self, index: int, prompt: Prompt, params: SamplingParams) -> _Open:
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbelow(SEED_RANGE))
        token_ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        token_ids = token_ids or (self.info.eos_token_id,)
        try:
            validate_request(token_ids, params, vocab_size=self.info.vocab_size, max_length=self.info.max_length)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.param, f"prompt {index}: {error.message}") from None
        request = GenerationRequest.of(request_id=self._next_id, prompt_token_ids=token_ids, params=params)
        self._next_id += 1
        return _Open(index, prompt, request, TextStream(self.tokenizer, params))

    def _run(self, pending: list[_Open]) -> Generator[tuple[_Open, Delta]]:
        """Feed the engine as it has room and yield what it delivers until all have ended.

        The consumer ends an answer early by aborting it; what it leaves open when it stops iterating is aborted here.
        """
        queue = iter(pending)
        by_id = {opened.request.request_id: opened for opened in pending}
        try:
            self._feed(queue)
            while self._core.has_work:
                report = self._core.step()
                for _, delta in report.deltas if report else ():
                    yield by_id[delta.request_id], delta
                self._feed(queue)
        finally:
            for request_id in by_id:
                self._core.abort(request_id)

    def _feed(self, queue: Iterator[_Open]) -> None:
        while self._core.load_now.waiting < self._max_waiting and (opened := next(queue, None)) is not None:
            self._core.add([(opened.request.request_id, opened.request)])

    def _progress(self, *, disable: bool) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
        )
        console = Console(stderr=True)
        return Progress(*columns, TimeRemainingColumn(), disable=disable, transient=True, console=console)


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt (text or token ids) or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [[item for item in prompts if isinstance(item, int)]]
    return [item for item in prompts if not isinstance(item, int)]
