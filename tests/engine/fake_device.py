"""A device for scheduler tests: pages that remember what was written, and answers that are known beforehand.

It runs a step when it is scheduled, as a device in order would: it is ahead of what the host has committed.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from engine.alignment import align_prompt
from engine.config import PromptAlignment
from engine.sequence import Sequence
from engine.step_plan import StepPlan
from engine.types import Delta, FinishReason, GenerationRequest, SamplingParams
from tests.engine.scheduling import BLOCK_LENGTH, EOS, PAD, tokens_of

STOP_TOKEN = 7
NOT_WRITTEN = None
"""Content of what a step that ran out of memory should have written, and of what was computed from that."""
GARBAGE = [666] * BLOCK_LENGTH


@dataclass(frozen=True)
class Script:
    """A request and the tokens that the model would write for it, ends ignored."""

    request: GenerationRequest
    alignment: PromptAlignment
    answer: list[int]
    failing_block: int | None

    @cached_property
    def sequence_prompt(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Aligned prompt tokens and forced tokens."""
        aligned = align_prompt(self.request.prompt_token_ids, BLOCK_LENGTH, self.alignment, PAD)
        return tuple(aligned.blocks.ravel().tolist()), aligned.forced

    @cached_property
    def stream(self) -> list[int]:
        """All tokens there would be: aligned prompt, forced tokens, answer."""
        prompt, forced = self.sequence_prompt
        return [*prompt, *forced, *self.answer]

    @cached_property
    def contents(self) -> list[int]:
        """For each position, what its keys and values depend on: all tokens up to it."""
        contents = [0]
        for start in range(0, len(self.stream), BLOCK_LENGTH):
            contents.append(hash((contents[-1], *self.stream[start : start + BLOCK_LENGTH])))
        return contents[1:]

    def expected(self) -> tuple[tuple[int, ...], FinishReason, int | None]:
        """Tokens, finish reason and stop reason of the whole answer, straight from the rules."""
        params = self.request.params
        forced = len(self.sequence_prompt[1])
        for index, token in enumerate(self.answer):
            block = (forced + index) // BLOCK_LENGTH
            if block == self.failing_block:
                return tuple(self.answer[: max(block * BLOCK_LENGTH - forced, 0)]), "error", None
            if index >= params.min_tokens:
                if token == EOS and not params.ignore_eos:
                    return tuple(self.answer[: index + 1]), "stop", None
                if token in params.stop_token_ids:
                    return tuple(self.answer[: index + 1]), "stop", token
            if index + 1 == params.max_tokens:
                return tuple(self.answer[: index + 1]), "length", None
        raise AssertionError("the script is shorter than max_tokens")


def make_script(
    key: int, seed: int, prompt: int, params: SamplingParams, alignment: PromptAlignment, *, priority: int, rare: int
) -> Script:
    """A script whose answer holds EOS or a stop token once in `rare` tokens, and now and then a block that fails.

    Its prompt begins as one of few texts does.
    """
    rng = random.Random(seed)
    answer = [
        rng.choice((EOS, STOP_TOKEN)) if not rng.randrange(rare) else rng.randrange(10, 90)
        for _ in range(params.max_tokens + 3 * BLOCK_LENGTH)
    ]
    text = random.Random(rng.randrange(2))
    shared = rng.choice((0, prompt // 2, prompt, prompt))
    prompt_token_ids = tuple(
        (text if place < shared else rng).choice((EOS, STOP_TOKEN, 20, 30)) for place in range(prompt)
    )
    salt = rng.choice(("", "", "", "salt"))
    request = GenerationRequest.of(
        request_id=key, prompt_token_ids=prompt_token_ids, params=params, priority=priority, cache_salt=salt
    )
    return Script(request, alignment, answer, rng.randrange(4) if not rng.randrange(10) else None)


@dataclass
class Row:
    """What the device knows of a row: whose it is, its page table, and its state, as it was bound and has gone on."""

    key: int
    script: Script
    next_decode: int
    generated: int
    forced: tuple[int, ...]
    positions: int
    """The first that it writes itself, then one on for each that it wrote."""
    pages: dict[int, int] = field(default_factory=dict)
    spoiled: bool = False
    """Whether it has read what was not written: nothing that it writes means anything."""


class FakeDevice:
    """Runs plans, and fails where a row would read anything else than what its own tokens would have written.

    What sequences that are out of memory should have written may be read; who did that writes garbage.
    """

    def __init__(self, page_size: int, scripts: dict[int, Script]) -> None:
        self._page_size = page_size
        self._scripts = scripts
        self._rows: dict[int, Row] = {}
        self._memory: dict[tuple[int, int], int | None] = {}

    def run(self, plan: StepPlan, out_of_memory: Collection[Sequence] = ()) -> tuple[list[list[int]], list[bool]]:
        """One step: the block of each decoding row, and whether its logits were finite.

        Nothing is done for sequences that are `out_of_memory`, in this step or in one before it.
        """
        firsts = dict(zip(plan.decode, plan.decode_positions.tolist(), strict=True))
        firsts |= {chunk.sequence: chunk.start for chunk in plan.prefill}
        for sequence in plan.bound:
            key = sequence.request.request_id
            self._rows[sequence.bound_row] = Row(
                key,
                self._scripts[key],
                next_decode=len(sequence.blocks) - 1,
                generated=sequence.generated,
                forced=sequence.forced,
                positions=firsts[sequence],
            )
            assert firsts[sequence] % self._page_size == 0, "a row begins in the middle of a page"
        for row, index, page in plan.page_entries.tolist():
            assert page != 0 and index not in self._rows[row].pages
            self._rows[row].pages[index] = page
        for chunk in plan.prefill:
            row_state = self._row_of(chunk.sequence)
            assert chunk.start == row_state.positions and chunk.length > 0
            known = slice(chunk.start * BLOCK_LENGTH, (chunk.start + chunk.length) * BLOCK_LENGTH)
            assert tokens_of(chunk.sequence)[known] == row_state.script.stream[known], "other tokens than were written"
            self._read(row_state, chunk.start)
            for position in range(chunk.start, chunk.start + chunk.length):
                self._write(row_state, position, written=chunk.sequence not in out_of_memory)
        results = [
            self._decode(self._row_of(sequence), position, written=sequence not in out_of_memory)
            for sequence, position in zip(plan.decode, plan.decode_positions, strict=True)
        ]
        return [block for block, _ in results], [finite for _, finite in results]

    def _row_of(self, sequence: Sequence) -> Row:
        row = self._rows[sequence.bound_row]
        assert row.key == sequence.request.request_id, "a plan uses a row that is another request's"
        return row

    def _read(self, row: Row, end: int) -> None:
        for position in range(end):
            content = self._memory[self._slot(row, position)]
            row.spoiled = row.spoiled or content is NOT_WRITTEN
            assert content in (row.script.contents[position], NOT_WRITTEN), "a page holds other tokens than its row's"

    def _write(self, row: Row, position: int, *, written: bool) -> None:
        assert position == row.positions, "a position was left out or came twice"
        good = written and not row.spoiled
        self._memory[self._slot(row, position)] = row.script.contents[position] if good else NOT_WRITTEN
        row.positions += 1

    def _decode(self, row: Row, position: int, *, written: bool) -> tuple[list[int], bool]:
        assert position == row.next_decode, "a row decodes before its prompt is there, or skips a position"
        self._write(row, position, written=written)
        self._read(row, position + 1)
        script = row.script
        number = (len(script.sequence_prompt[1]) + row.generated) // BLOCK_LENGTH
        sampled = BLOCK_LENGTH - len(row.forced)
        block = [*row.forced, *script.answer[row.generated : row.generated + sampled]]
        row.generated += sampled
        row.forced = ()
        row.next_decode += 1
        return GARBAGE if row.spoiled else block, number != script.failing_block

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        return row.pages[position // self._page_size], position % self._page_size


@dataclass
class Answer:
    """What was delivered to one request."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    deltas: int = 0

    def take(self, delta: Delta) -> None:
        """Add a delta; fails where it comes after the end, is empty, or tells its timing at the wrong time."""
        assert self.finish_reason is None, "a delta came after the end"
        assert delta.token_ids or delta.finish_reason == "error"
        assert (delta.error is not None) == (delta.finish_reason == "error")
        assert (delta.timing is not None) == (self.deltas == 0 and bool(delta.token_ids))
        if delta.timing is not None:
            assert delta.timing.queue >= 0 and delta.timing.prefill >= 0
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.deltas += 1
