import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.waiting_queue import WaitingQueue
from tests.engine.scheduling import make_sequence


def test_smaller_priority_first_and_arrival_among_equals() -> None:
    queue = WaitingQueue()
    for key, priority in enumerate([5, 0, 5, -1, 0]):
        queue.push(make_sequence(key, priority=priority))
    assert [queue.pop().key for _ in range(len(queue))] == [3, 1, 4, 0, 2]


def test_what_had_its_turn_comes_back_to_its_place() -> None:
    queue = WaitingQueue()
    sequences = [make_sequence(key, priority=priority) for key, priority in enumerate([0, 0, 1, 0])]
    for sequence in sequences:
        queue.push(sequence)
    taken = [queue.pop() for _ in range(2)]
    queue.push(make_sequence(4))
    for sequence in reversed(taken):
        queue.push_back(sequence)
    queue.check_integrity()
    assert [queue.pop().key for _ in range(len(queue))] == [0, 1, 3, 4, 2]


def test_an_empty_queue_has_no_head() -> None:
    queue = WaitingQueue()
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_only_what_waits_can_be_taken_back() -> None:
    queue = WaitingQueue()
    sequence = make_sequence(1)
    queue.push(sequence)
    queue.remove(sequence)
    with pytest.raises(KeyError):
        queue.remove(sequence)
    assert queue.peek() is None and len(queue) == 0


def test_what_comes_and_goes_behind_a_waiting_head_leaves_nothing() -> None:
    queue = WaitingQueue()
    head = make_sequence(0)
    queue.push(head)
    for key in range(1, 2000):
        sequence = make_sequence(key)
        queue.push(sequence)
        queue.remove(sequence)
        queue.check_integrity()
    assert queue.pop() is head


@given(st.lists(st.tuples(st.sampled_from(["push", "push", "push", "pop", "remove"]), st.integers(0, 300))))
def test_it_behaves_like_a_sorted_list(actions: list[tuple[str, int]]) -> None:
    queue = WaitingQueue()
    model: list[tuple[int, int]] = []
    sequences = {}
    for order, (action, number) in enumerate(actions):
        if action == "push":
            sequences[order] = make_sequence(order, priority=number % 5)
            queue.push(sequences[order])
            model.append((number % 5, order))
            model.sort()
        elif model and action == "pop":
            assert queue.pop() is sequences[model.pop(0)[1]]
        elif model:
            queue.remove(sequences[model.pop(number % len(model))[1]])
        queue.check_integrity()
        assert len(queue) == len(model)
        assert queue.peek() is (sequences[model[0][1]] if model else None)
