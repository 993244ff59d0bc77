import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.alignment import AlignedPrompt, align_prompt
from engine.config import PromptAlignment

ALIGNMENTS: tuple[PromptAlignment, ...] = ("left_pad", "forced_tail")


@pytest.mark.parametrize(
    ("prompt", "alignment", "expected"),
    [
        ([1, 2, 3, 4], "left_pad", AlignedPrompt((1, 2, 3, 4), (), 0)),
        ([1, 2, 3, 4], "forced_tail", AlignedPrompt((1, 2, 3, 4), (), 0)),
        ([1, 2, 3, 4, 5], "left_pad", AlignedPrompt((9, 9, 9, 1, 2, 3, 4, 5), (), 3)),
        ([1, 2, 3, 4, 5], "forced_tail", AlignedPrompt((1, 2, 3, 4), (5,), 0)),
        ([1, 2, 3], "left_pad", AlignedPrompt((9, 1, 2, 3), (), 1)),
        ([1, 2, 3], "forced_tail", AlignedPrompt((9, 1, 2, 3), (), 1)),
    ],
)
def test_prompts_of_blocks_of_four(prompt: list[int], alignment: PromptAlignment, expected: AlignedPrompt) -> None:
    assert align_prompt(prompt, 4, alignment, 9) == expected


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 9), st.sampled_from(ALIGNMENTS))
def test_nothing_of_a_prompt_is_lost_and_blocks_are_whole(
    prompt: list[int], block_length: int, alignment: PromptAlignment
) -> None:
    aligned = align_prompt(prompt, block_length, alignment, 7)
    assert [*aligned.tokens, *aligned.forced] == [7] * aligned.padding + prompt
    assert aligned.tokens and len(aligned.tokens) % block_length == 0
    assert len(aligned.forced) < block_length and aligned.padding < block_length
    assert not (aligned.forced and aligned.padding)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_vanilla_model_needs_neither_padding_nor_force(alignment: PromptAlignment) -> None:
    assert align_prompt([1, 2, 3], 1, alignment, 9) == AlignedPrompt((1, 2, 3), (), 0)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_an_empty_prompt_is_refused(alignment: PromptAlignment) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        align_prompt([], 4, alignment, 0)
