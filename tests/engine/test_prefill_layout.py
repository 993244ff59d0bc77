import numpy as np
import pytest

from engine.prefill_layout import ALIGNMENT, PrefillLayout, padding_table
from engine.row_table import RowTable
from engine.step_plan import PrefillChunk
from tests.engine.scheduling import BLOCK_LENGTH, make_sequence

PADDING_ROW = 8


def chunks_of(*numbers: tuple[int, int, int]) -> list[PrefillChunk]:
    """Chunks (row, first position, length) of sequences of eight blocks, each with tokens of its own."""
    table = RowTable(PADDING_ROW, BLOCK_LENGTH)
    chunks = []
    for row, start, length in numbers:
        tokens = range(1000 * row, 1000 * row + 8 * BLOCK_LENGTH)
        sequence = make_sequence(row, tokens)
        sequence.take_row(row, table)
        chunks.append(PrefillChunk(sequence, start, length))
    return chunks


def test_chunks_lie_one_behind_the_other_and_padding_behind_them() -> None:
    layout = PrefillLayout.of(chunks_of((5, 2, 3), (0, 0, 1)), PADDING_ROW)
    assert layout.blocks.dtype == layout.table.dtype == np.int32
    assert layout.blocks.tolist() == [
        [5008, 5009, 5010, 5011],
        [5012, 5013, 5014, 5015],
        [5016, 5017, 5018, 5019],
        [0, 1, 2, 3],
    ]
    assert layout.table.tolist() == [[5, 0, PADDING_ROW, PADDING_ROW], [2, 0, 0, 0], [0, 3, 4, 4]]


@pytest.mark.parametrize("count", range(1, 8))
def test_lines_are_aligned_and_end_with_padding(count: int) -> None:
    layout = PrefillLayout.of(chunks_of(*((row, 0, 2) for row in range(count))), PADDING_ROW)
    columns = layout.table.shape[1]
    assert columns % ALIGNMENT == 0
    assert 1 <= columns - count <= ALIGNMENT
    assert (layout.table[:, count:] == [[PADDING_ROW], [0], [2 * count]]).all()
    wide = layout.widened(columns + 5)
    assert (wide[:, :columns] == layout.table).all()
    assert (wide[:, columns:] == [[PADDING_ROW], [0], [2 * count]]).all()
    assert layout.widened(columns).tolist() == layout.table.tolist()


def test_a_table_of_padding_alone() -> None:
    assert padding_table(4, PADDING_ROW).tolist() == [[PADDING_ROW] * 4, [0] * 4, [0] * 4]
