"""The knapsack against trying every combination."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbook.budget.allocate import Option, allocate

options = st.lists(st.builds(Option, st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=4)


@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 150))
def test_the_choice_is_the_best_of_all_that_fit(tensors: list[list[Option]], budget: int) -> None:
    fitting = [
        sum(option.loss for option in combination)
        for combination in itertools.product(*tensors)
        if sum(option.size for option in combination) <= budget
    ]
    picks = allocate(tensors, budget)
    if not fitting:
        assert picks is None
        return
    assert picks is not None
    chosen = [of[pick] for of, pick in zip(tensors, picks, strict=True)]
    assert sum(option.size for option in chosen) <= budget
    assert sum(option.loss for option in chosen) == pytest.approx(min(fitting))


def test_large_budgets_are_kept_in_coarser_units() -> None:
    tensors = [[Option(10**9, 3.0), Option(2 * 10**9, 1.0), Option(3 * 10**9, 0.0)] for _ in range(8)]
    picks = allocate(tensors, 15 * 10**9)
    assert picks is not None
    assert sum(of[pick].size for of, pick in zip(tensors, picks, strict=True)) <= 15 * 10**9
    assert sum(of[pick].loss for of, pick in zip(tensors, picks, strict=True)) <= 12.0
