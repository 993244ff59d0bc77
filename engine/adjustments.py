"""The device's side of bias, penalties and logprobs: which rows ask for any, and what the kernels need to know of them.

A row that asks has a slot, where its counts of tokens lie: a table with a line a row would take more memory than it is
worth to a server whose clients hardly ever ask.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.staging import Staging
from engine.types import MAX_LOGIT_BIAS
from kernels.adjust import IN_PROMPT, AdjustmentTables

FIRST_SLOTS = 16
"""Slots that the first row to ask for one makes; doubled whenever they do not suffice."""

STRONGEST = 1e12
"""Repetition penalties above it and below its inverse do what these do: logits times it are far from the end of single
precision also when the least temperature has divided them."""


class Adjustments:
    """Tables of adjustments; `bind` and `make_room` are the only writers from the host.

    wanted [rows] int32: how many of the likeliest tokens a row wants the logprobs of; -1 where it wants none at all.
    """

    def __init__(self, *, rows: int, vocab_size: int, staging: Staging) -> None:
        self._upload = staging.upload
        self._vocab_size = vocab_size
        self._device = staging.device
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._wanting: set[int] = set()
        """Rows that want logprobs."""
        self.wanted = torch.full((rows,), -1, dtype=torch.int32, device=self._device)
        self.tables = self._new_tables(torch.zeros(rows, dtype=torch.int32, device=self._device), 1)

    def make_room(self, sequences: Seq[Sequence]) -> bool:
        """See to it that `bind` finds a slot for each of the sequences that need one.

        Whether there is another `tables` now: then graphs of the old one are of no use any more. Nothing has changed
        where memory does not suffice, which raises.
        """
        taken = len(self._slots.keys() - {sequence.bound_row for sequence in sequences})
        needed = taken + sum(sequence.request.params.adjusts for sequence in sequences)
        old = self.tables
        slots = len(old.repetition) - 1
        if needed <= slots:
            return False
        while slots < needed:
            slots = max(FIRST_SLOTS, 2 * slots)
        larger = self._new_tables(old.slot, slots + 1)
        for name, table in vars(old).items():
            if name != "slot":
                getattr(larger, name)[: len(table)] = table
        self._free += range(slots, len(old.repetition) - 1, -1)
        self.tables = larger
        return True

    def bind(self, sequences: Seq[Sequence]) -> None:
        """Write what sequences ask for that got their rows; `make_room` was called for them."""
        bound = [sequence.bound_row for sequence in sequences]
        held = [row for row in bound if row in self._slots]
        self._free += [self._slots.pop(row) for row in held]
        asking = [sequence for sequence in sequences if sequence.request.params.adjusts]
        tables, upload = self.tables, self._upload
        wanting = {sequence.bound_row for sequence in sequences if sequence.request.params.logprobs is not None}
        if wanting or not self._wanting.isdisjoint(bound):
            self._wanting = self._wanting.difference(bound) | wanting
            top = [sequence.request.params.logprobs for sequence in sequences]
            self.wanted[upload(bound, np.int64)] = upload([-1 if n is None else n for n in top], np.int32)
        self._slots |= {sequence.bound_row: self._free.pop() for sequence in asking}
        if held or asking:
            tables.slot[upload(bound, np.int64)] = upload([self._slots.get(row, 0) for row in bound], np.int32)
        if not asking:
            return
        slots = upload([self._slots[sequence.bound_row] for sequence in asking], np.int64)
        params = [sequence.request.params for sequence in asking]
        ids = np.full((len(asking), MAX_LOGIT_BIAS), -1, np.int32)
        values = np.zeros((len(asking), MAX_LOGIT_BIAS), np.float32)
        for place, one in enumerate(params):
            ids[place, : len(one.logit_bias)] = [token for token, _ in one.logit_bias]
            values[place, : len(one.logit_bias)] = [bias for _, bias in one.logit_bias]
        repetition = np.clip([one.repetition_penalty for one in params], 1 / STRONGEST, STRONGEST)
        tables.repetition[slots] = upload(repetition, np.float32)
        tables.presence[slots] = upload([one.presence_penalty for one in params], np.float32)
        tables.frequency[slots] = upload([one.frequency_penalty for one in params], np.float32)
        tables.bias_ids[slots] = upload(ids, np.int32)
        tables.bias_values[slots] = upload(values, np.float32)
        tables.bias_length[slots] = upload([len(one.logit_bias) for one in params], np.int32)
        tables.counts[slots] = upload(np.stack([self._counts(sequence) for sequence in asking]), np.int32)

    def entries(self, row_index: Tensor, tokens: Tensor, forced_length: Tensor) -> tuple[Tensor, Tensor]:
        """What `count` is to add for a step in which rows `row_index` [R] wrote `tokens` [R, L]: places and numbers."""
        slots = self.tables.slot[row_index.long()].long()[:, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        generated = (places >= forced_length[:, None]) & (slots > 0)
        return (slots * self._vocab_size + tokens).flatten(), generated.int().flatten()

    def count(self, entries: tuple[Tensor, Tensor]) -> None:
        """Count the tokens that a step wrote."""
        self.tables.counts.view(-1).index_add_(0, *entries)

    def _counts(self, sequence: Sequence) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        counts = np.zeros(self._vocab_size, np.int32)
        if sequence.generated:
            np.add.at(counts, sequence.blocks.ravel()[-sequence.generated :], 1)
        counts[np.frombuffer(sequence.request.prompt, np.int32)] += IN_PROMPT
        return counts

    def _new_tables(self, slot: Tensor, slots: int) -> AdjustmentTables:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        return AdjustmentTables(
            slot=slot,
            repetition=torch.ones(slots, dtype=torch.float32, device=self._device),
            presence=zeros(slots, dtype=torch.float32),
            frequency=zeros(slots, dtype=torch.float32),
            counts=zeros(slots, self._vocab_size),
            bias_ids=torch.full((slots, MAX_LOGIT_BIAS), -1, dtype=torch.int32, device=self._device),
            bias_values=zeros(slots, MAX_LOGIT_BIAS, dtype=torch.float32),
            bias_length=zeros(slots),
        )
