"""Bias and penalties against plain Python, rule by rule."""

import pytest
import torch
from torch import Tensor

from kernels.adjust import IN_PROMPT, AdjustmentTables
from kernels.dispatch import Kernels
from tests.kernels.reference import DTYPES, int32, random

ROWS = [2, 0, 3, 1]
SLOTS = [0, 2, 1, 0]
"""Of the table's rows 0 to 3: rows 0 and 3 ask for nothing."""


def tables(vocab_size: int) -> AdjustmentTables:
    """Slot 1 has everything; slot 2 a penalty below 1 and negative ones. Some tokens are in prompt and answer both."""
    counts = torch.zeros(3, vocab_size, dtype=torch.int32)
    counts[1, :40:3] = 2
    counts[1, :40:4] += IN_PROMPT
    counts[2, 5], counts[2, 6] = IN_PROMPT, 7
    return AdjustmentTables(
        slot=int32(SLOTS),
        repetition=torch.tensor([1.0, 1.3, 0.7]),
        presence=torch.tensor([0.0, 0.5, -1.25]),
        frequency=torch.tensor([0.0, 0.25, -2.0]),
        counts=counts,
        bias_ids=torch.tensor([[-1] * 4, [0, vocab_size - 1, 7, -1], [6, -1, -1, -1]], dtype=torch.int32),
        bias_values=torch.tensor([[9.0] * 4, [-100.0, 3.0, 0.5, 9.0], [1.5, 9.0, 9.0, 9.0]]),
        bias_length=int32([0, 3, 1]),
    )


def expected(logits: Tensor, block: list[list[int]], settings: AdjustmentTables) -> list[list[float]]:
    """The formula in Python's own floats."""
    rows = []
    for line, row, written in zip(logits.tolist(), ROWS, block, strict=True):
        slot = SLOTS[row]
        length = int(settings.bias_length[slot])
        biases = settings.bias_values[slot, :length].tolist()
        bias = dict(zip(settings.bias_ids[slot, :length].tolist(), biases, strict=True))
        penalties = (settings.repetition, settings.presence, settings.frequency)
        repetition, presence, frequency = (float(table[slot]) for table in penalties)
        out = []
        for token, logit in enumerate(line):
            count = int(settings.counts[slot, token])
            generated = count % IN_PROMPT + written.count(token)
            score = logit + bias.get(token, 0.0)
            if count or generated:
                score = score / repetition if score > 0 else score * repetition
            out.append(score - (presence if generated else 0) - frequency * generated)
        rows.append(out)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [50, 1500])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_the_formula(kernels: Kernels, dtype: torch.dtype, vocab_size: int, width: int) -> None:
    logits = random(4, vocab_size, dtype=dtype, scale=3.0)
    block = [[3, 3, 8], [1, 1, 1], [9, -1, -1], [6, 5, -1]]
    written = torch.tensor(block, dtype=torch.int32)[:, :width].contiguous()
    settings = tables(vocab_size)
    ours = kernels.adjust(logits, int32(ROWS), written, settings)
    assert ours.dtype == torch.float32
    wanted = torch.tensor(expected(logits, written.tolist(), settings))
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-6)
    # Rows without a slot are as they were, to the last bit.
    assert torch.equal(ours[1:3], logits[1:3].float())
    assert not torch.equal(ours[0], logits[0].float()) and not torch.equal(ours[3], logits[3].float())


def test_what_is_not_finite_stays(kernels: Kernels) -> None:
    logits = torch.tensor([[-torch.inf, torch.nan, 1.0, torch.inf] * 20] * 4)
    ours = kernels.adjust(logits, int32(ROWS), torch.zeros(4, 0, dtype=torch.int32), tables(80))
    assert torch.equal(ours.isnan(), logits.isnan())
    assert torch.equal(ours.isposinf(), logits.isposinf())
    assert torch.equal(ours.isneginf(), logits.isneginf())
