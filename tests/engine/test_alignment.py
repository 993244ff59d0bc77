import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.alignment import align_prompt
from engine.config import PromptAlignment

Aligned = tuple[tuple[int, ...], tuple[int, ...], int]

ALIGNMENTS: tuple[PromptAlignment, ...] = ("left_pad", "forced_tail")


def aligned(prompt: list[int], block_length: int, alignment: PromptAlignment) -> Aligned:
    """The blocks' tokens, the forced ones and the padding."""
    result = align_prompt(prompt, block_length, alignment, 9)
    return tuple(result.blocks.ravel().tolist()), result.forced, result.padding


@pytest.mark.parametrize(
    ("prompt", "alignment", "expected"),
    [
        ([1, 2, 3, 4], "left_pad", ((1, 2, 3, 4), (), 0)),
        ([1, 2, 3, 4], "forced_tail", ((1, 2, 3, 4), (), 0)),
        ([1, 2, 3, 4, 5], "left_pad", ((9, 9, 9, 1, 2, 3, 4, 5), (), 3)),
        ([1, 2, 3, 4, 5], "forced_tail", ((1, 2, 3, 4), (5,), 0)),
        ([1, 2, 3], "left_pad", ((9, 1, 2, 3), (), 1)),
        ([1, 2, 3], "forced_tail", ((9, 1, 2, 3), (), 1)),
    ],
)
def test_prompts_of_blocks_of_four(prompt: list[int], alignment: PromptAlignment, expected: Aligned) -> None:
    assert aligned(prompt, 4, alignment) == expected


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 9), st.sampled_from(ALIGNMENTS))
def test_nothing_of_a_prompt_is_lost_and_blocks_are_whole(
    prompt: list[int], block_length: int, alignment: PromptAlignment
) -> None:
    result = align_prompt(prompt, block_length, alignment, 7)
    assert [*result.blocks.ravel().tolist(), *result.forced] == [7] * result.padding + prompt
    assert len(result.blocks) and result.blocks.shape[1] == block_length
    assert len(result.forced) < block_length and result.padding < block_length
    assert not (result.forced and result.padding)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_vanilla_model_needs_neither_padding_nor_force(alignment: PromptAlignment) -> None:
    assert aligned([1, 2, 3], 1, alignment) == ((1, 2, 3), (), 0)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_an_empty_prompt_is_refused(alignment: PromptAlignment) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        align_prompt([], 4, alignment, 0)
