import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.step_budget import ATTENTION_COST, StepBudget

POSITIONS = st.integers(0, 1 << 20)


@given(POSITIONS, POSITIONS)
def test_positions_alone_count_where_attention_costs_nothing(start: int, budget: int) -> None:
    assert StepBudget(16).cost(start, budget) == StepBudget(16).affordable(start, budget) == budget


@given(POSITIONS, st.integers(1, 1 << 17), st.sampled_from([1.0, 100.0, 2304.0, 6144.0]))
def test_the_longest_chunk_that_can_be_paid_for(start: int, budget: int, attention_positions: float) -> None:
    step = StepBudget(budget, attention_positions)
    length = step.affordable(start, budget)
    assert 1 <= length <= budget
    assert length == 1 or step.cost(start, length) <= budget
    assert step.cost(start, length + 1) > budget


def test_nothing_is_affordable_for_nothing() -> None:
    assert StepBudget(16, 8.0).affordable(0, 0) == 0


def test_attention_costs_as_much_as_the_products_at_the_context_where_it_takes_as_long() -> None:
    step = StepBudget.of(1024, hidden_size=2048, intermediate_size=8192)
    context = round((2 * 2048 + 8192) / ATTENTION_COST)
    assert step.cost(context, 1) == pytest.approx(2, abs=1)
    assert step.cost(context, 100) == 100 + 101
    assert step.positions == 1024
