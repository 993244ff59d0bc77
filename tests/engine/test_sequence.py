import pytest

from engine.config import PromptAlignment
from engine.sequence import SequenceState
from engine.types import SamplingParams
from tests.engine.scheduling import PAD, make_sequence, tokens_of


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "alignment", "prefill_end", "end_position"),
    [
        (4, 1, "left_pad", 0, 1),
        (4, 4, "left_pad", 0, 1),
        (4, 5, "left_pad", 0, 2),
        (1, 8, "left_pad", 0, 2),
        (9, 4, "left_pad", 2, 3),
        (9, 3, "forced_tail", 1, 2),
        (9, 4, "forced_tail", 1, 3),
        (11, 1, "forced_tail", 1, 2),
        (11, 2, "forced_tail", 1, 3),
    ],
)
def test_positions_are_known_from_the_start(
    prompt: int, max_tokens: int, alignment: PromptAlignment, prefill_end: int, end_position: int
) -> None:
    sequence = make_sequence(1, prompt, max_tokens=max_tokens, alignment=alignment)
    assert (sequence.prefill_end, sequence.end_position) == (prefill_end, end_position)


def test_a_new_sequence_waits_and_holds_nothing() -> None:
    sequence = make_sequence(7, 6, params=SamplingParams(stop_token_ids=(3, 5)))
    assert sequence.state is SequenceState.WAITING
    assert (sequence.row, sequence.pages, sequence.position, sequence.generated) == (None, [], 0, 0)
    assert tokens_of(sequence) == [PAD, PAD, 101, 102, 103, 104, 105, 106]
    assert sequence.stop_token_ids == {3, 5}


def test_a_row_is_an_error_where_there_is_none() -> None:
    sequence = make_sequence(7)
    with pytest.raises(ValueError, match="sequence 7 holds no row"):
        _ = sequence.bound_row
    sequence.row = 0
    assert sequence.bound_row == 0


def test_its_name_in_messages_tells_where_it_stands() -> None:
    assert repr(make_sequence(7, 8)) == "Sequence(7, waiting, row=None, position=0/3, generated=0/8, in_flight=0)"
