"""Log-likelihoods of given texts, beside generation: a chunk of them after each step.

A text's blocks go through the block decoder, whose outputs are kept; then the writer is told each block's tokens
instead of choosing them, all blocks of a chunk at once. Keys and values have memory of their own, as much as the
longest text needs, so that texts take no pages from requests.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache, KVLayout
from engine.model.block_decoder import PrefillBatch
from engine.model.model import Model
from engine.model.writer import Scratch
from engine.out_of_memory import attempt
from engine.prefill_layout import chunk_table
from engine.prefill_step import prefill_batch
from engine.scheduler import NON_FINITE_ERROR, OUT_OF_MEMORY_ERROR
from engine.score_layout import ScoreLayout
from engine.staging import Staging, on_the_way_here
from engine.step_plan import BlockLogprobs
from engine.types import Delta, ScoreRequest
from kernels.dispatch import Kernels
from kernels.logprobs import Logprobs

WRITER_ROWS = 256
"""Blocks that the writer is told at once: each needs logits of the whole vocabulary."""


@dataclass(eq=False)
class ScoredText:
    """A text, and what is known of it."""

    key: Hashable
    request: ScoreRequest
    layout: ScoreLayout
    tokens: int
    parts: list[BlockLogprobs] = field(default_factory=list)
    """[positions, L] each, in order."""
    first_page: int = 0
    """Its pages follow one another."""
    aborted: bool = False

    def delta(self) -> Delta:
        """Its logprobs, all of which are known."""
        length = self.layout.blocks.shape[1]
        count, flat = self.tokens - self.layout.skipped, (1, self.layout.positions * length)
        if count <= 0:
            return Delta(request_id=self.request.request_id, finish_reason="length")
        chosen, ids, values = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        told = BlockLogprobs(chosen.reshape(flat), ids.reshape(*flat, -1), values.reshape(*flat, -1))
        first = self.layout.first
        if np.isnan(told.chosen[0, first : first + count]).any():
            return self.failed(NON_FINITE_ERROR)
        logprobs = told.of_row(0, first, first + count, self.request.top)
        return Delta(request_id=self.request.request_id, finish_reason="length", logprobs=logprobs)

    def failed(self, error: str) -> Delta:
        """Why there is nothing to tell."""
        return Delta(request_id=self.request.request_id, finish_reason="error", error=error)


@dataclass
class _Piece:
    """Consecutive positions of one text."""

    text: ScoredText
    start: int
    end: int


@dataclass
class _Launched:
    """A chunk that the device works on."""

    pieces: list[_Piece]
    told: list[Tensor]
    """Logprobs [positions, L, ...] of all pieces, on the host once `arrived`."""
    arrived: torch.cuda.Event | None


class Scorer:
    """Texts wait in order of arrival; as many as fit into the cache are worked on together."""

    def __init__(self, model: Model, kernels: Kernels, layout: KVLayout, config: EngineConfig) -> None:
        """Memory is taken with the first text."""
        self._model = model
        self._kernels = kernels
        self._layout = layout
        self._device = torch.device(config.device)
        self._overlapped = config.overlapped
        self._chunk = config.max_step_positions
        self._staging = Staging(self._device)
        self._pages = self._pages_for(model.config.max_positions)
        self._memory: tuple[KVCache, Scratch] | None = None
        self._queue: deque[ScoredText] = deque()
        self._batch: list[ScoredText] = []
        self._pieces: deque[_Piece] = deque()
        self._in_flight: _Launched | None = None

    @property
    def waiting(self) -> int:
        """Texts that are not worked on yet."""
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._queue or self._batch or self._in_flight)

    def add(self, texts: Seq[ScoredText]) -> None:
        """Queue texts of at most the model's longest layout."""
        self._queue += texts

    def abort(self, key: Hashable) -> bool:
        """Forget a text; False if it is not known (any more)."""
        for text in (*self._queue, *self._batch):
            if text.key == key and not text.aborted:
                text.aborted = True
                return True
        return False

    def step(self) -> list[tuple[Hashable, Delta]]:
        """Launch a chunk and take the result of one: overlapped, that of the call before. What ended, by key."""
        ended: list[tuple[ScoredText, Delta]] = []
        launched = self._launch(ended)
        if self._overlapped:
            launched, self._in_flight = self._in_flight, launched
        if launched is not None:
            ended += self._take(launched)
        return [(text.key, delta) for text, delta in ended if not text.aborted]

    def _take(self, launched: _Launched) -> Iterator[tuple[ScoredText, Delta]]:
        if launched.arrived is not None:
            launched.arrived.synchronize()
        chosen, ids, values = (part.numpy() for part in launched.told)
        start = 0
        for piece in launched.pieces:
            end = start + piece.end - piece.start
            top = piece.text.request.top
            likeliest = ids[start:end, :, :top], values[start:end, :, :top]
            piece.text.parts.append(BlockLogprobs(chosen[start:end], *likeliest))
            start = end
            if piece.end == piece.text.layout.positions and piece.text in self._batch:
                self._batch.remove(piece.text)
                yield piece.text, piece.text.delta()

    @torch.inference_mode()
    def _launch(self, ended: list[tuple[ScoredText, Delta]]) -> _Launched | None:
        if not self._batch:
            self._begin_batch(ended)
        pieces = self._next_pieces()
        if not pieces:
            return None
        with self._staging.step():
            launched = attempt(partial(self._run, pieces), self._device)
        if launched is None:
            ended += [(text, text.failed(OUT_OF_MEMORY_ERROR)) for text in self._batch]
            self._batch, self._memory = [], None
            self._pieces.clear()
        return launched

    def _begin_batch(self, ended: list[tuple[ScoredText, Delta]]) -> None:
        used = 0
        while self._queue and used + self._pages_for(self._queue[0].layout.positions) <= self._pages:
            text = self._queue.popleft()
            if text.aborted:
                continue
            if text.tokens <= text.layout.skipped:
                ended.append((text, text.delta()))
                continue
            text.first_page = 1 + used
            used += self._pages_for(text.layout.positions)
            self._batch.append(text)
            self._pieces.append(_Piece(text, 0, text.layout.positions))

    def _next_pieces(self) -> list[_Piece]:
        pieces, budget = [], self._chunk
        while self._pieces and budget:
            piece = self._pieces.popleft()
            cut = min(piece.end, piece.start + budget)
            if cut < piece.end:
                self._pieces.appendleft(_Piece(piece.text, cut, piece.end))
            pieces.append(_Piece(piece.text, piece.start, cut))
            budget -= cut - piece.start
        return pieces

    def _run(self, pieces: list[_Piece]) -> _Launched:
        if self._memory is None:
            cache = KVCache.allocate(self._layout, self._pages, self._device)
            self._memory = cache, self._model.new_scratch(WRITER_ROWS)
        cache, scratch = self._memory
        upload = self._staging.upload
        blocks = [piece.text.layout.blocks[piece.start : piece.end] for piece in pieces]
        written = [piece.text.layout.blocks[piece.start + 1 : piece.end + 1] for piece in pieces]
        contexts = self._model.contexts(
            upload(np.concatenate(blocks), np.int32), self._prefill_batch(pieces), cache.keys, cache.values
        )
        top = [piece.text.request.top for piece in pieces]
        wanted = upload(np.repeat(top, [piece.end - piece.start for piece in pieces]), np.int32)
        told = self._told(contexts, upload(np.concatenate(written), np.int32), wanted, scratch)
        tensors = [told.chosen, told.ids[..., : max(top)], told.values[..., : max(top)]]
        if self._device.type != "cuda":
            return _Launched(pieces, tensors, None)
        here = on_the_way_here(tensors)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Launched(pieces, here, arrived)

    def _told(self, contexts: Tensor, blocks: Tensor, wanted: Tensor, scratch: Scratch) -> Logprobs:
        """Logprobs [N, L, ...] of the tokens of blocks [N, L], given the contexts [N, H] in front of them."""
        parts: list[list[Tensor]] = []
        for start in range(0, len(contexts), WRITER_ROWS):
            rows = slice(start, start + WRITER_ROWS)
            places: list[Logprobs] = []

            def tell(logits: Tensor, place: int, rows: slice = rows, places: list[Logprobs] = places) -> Tensor:
                tokens = blocks[rows, place].contiguous()
                places.append(self._kernels.top_logprobs(logits, tokens, wanted[rows]))
                return tokens

            self._model.write_block(contexts[rows], scratch, tell)
            parts.append([torch.stack(one, dim=1) for one in zip(*places, strict=True)])
        return Logprobs(*(torch.cat(one) for one in zip(*parts, strict=True)))

    def _prefill_batch(self, pieces: list[_Piece]) -> PrefillBatch:
        pages = np.zeros((len(pieces), self._pages), np.int32)
        for row, piece in zip(pages, pieces, strict=True):
            used = self._pages_for(piece.end)
            row[:used] = np.arange(piece.text.first_page, piece.text.first_page + used)
        starts, lengths = [piece.start for piece in pieces], [piece.end - piece.start for piece in pieces]
        # There is no padding, whose row would be this one.
        table = chunk_table(range(len(pieces)), starts, lengths, padding_row=0)
        upload = self._staging.upload
        return prefill_batch(sum(lengths), upload(table, np.int32), upload(pages, np.int32), self._layout.page_size)

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self._layout.page_size)
