import torch

from engine.batch_tables import BatchTables
from engine.staging import Staging

L = 4


def test_rows_advance_by_a_block_and_padding_stays_where_it_is() -> None:
    tables = BatchTables(
        max_rows=3,
        max_pages=2,
        block_length=L,
        eos_token_id=0,
        max_suppressed=1,
        vocab_size=50,
        staging=Staging(torch.device("cpu")),
    )
    tables.position[:3] = torch.tensor([5, 6, 7])
    tables.generated[:3] = torch.tensor([0, 8, 20])
    tables.forced_length[:3] = torch.tensor([3, 0, 1])
    for _ in range(2):
        index = torch.tensor([2, 0, tables.padding_row, tables.padding_row])
        states = tables.states(index)
        numbers = (tables.position, tables.generated, tables.forced_length)
        assert states.tolist() == [of_row[index].tolist() for of_row in numbers]
        tables.advance(index, states, torch.arange(4 * L).view(4, L))
    assert tables.position.tolist() == [7, 6, 9, 0]
    assert tables.generated.tolist()[:3] == [1 + L, 8, 20 + 3 + L]
    assert tables.forced_length.tolist()[:3] == [0, 0, 0]
    assert tables.last_block[:3].tolist() == [[4, 5, 6, 7], [0, 0, 0, 0], [0, 1, 2, 3]]
