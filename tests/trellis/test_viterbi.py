from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbook.trellis import viterbi
from bitbook.trellis.machine import SIZES, next_states, previous
from bitbook.trellis.viterbi import Ladder, best_path, ladder_costs, table_costs, walk

VALUES = np.array([-1.9, -0.7, 0.1, 0.8, 1.7])
PRICED = Ladder(VALUES, np.array([3.1, 3.0, 1.5, 0.4, 1.3, 2.9, 2.8]), 2.0, 0.3)
FREE = Ladder(VALUES, np.zeros(3), 0.0, 0.0)


def value(j: int, ladder: Ladder) -> float:
    size = len(ladder.values) // 2
    place = min(max(j, -size), size)
    return ladder.values[place + size] + (j - place)


def bits(j: int, ladder: Ladder) -> float:
    most, steps = len(ladder.bits) // 2, 0
    while abs(j) > most:
        j, steps = (j - 2 if j > 0 else j + 2), steps + 1
    return float(ladder.bits[j + most]) + steps * ladder.slope


def cost(w, weight, path, ladder: Ladder) -> float:  # type: ignore[no-untyped-def]
    pairs = zip(w, weight, path, strict=True)
    return sum(m * (x - value(j, ladder)) ** 2 + ladder.lam * bits(j, ladder) for x, m, j in pairs)


def cheapest(w, weight, ladder: Ladder, states: int) -> float:  # type: ignore[no-untyped-def]
    """Every path that may be, one after the other."""
    paths = itertools.product(range(-7, 8), repeat=len(w))
    return min(cost(w, weight, path, ladder) for path in paths if walk(np.array(path), states) >= 0)


@settings(max_examples=10)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=4), st.sampled_from([4, 8]), st.booleans())
def test_no_path_is_better(w: list[float], states: int, priced: bool) -> None:
    ladder = PRICED if priced else FREE
    weight = np.linspace(0.5, 2, len(w))
    path, state = best_path(len(w), ladder_costs(np.array(w), weight, ladder), states)
    assert state == walk(path, states) >= 0
    assert cost(w, weight, path, ladder) == pytest.approx(cheapest(w, weight, ladder, states), abs=1e-9)


@pytest.mark.parametrize("states", SIZES)
def test_segments_change_nothing(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).standard_normal(3000)
    costs = ladder_costs(w, np.ones(3000), PRICED)
    whole = best_path(3000, costs, states)
    monkeypatch.setattr(viterbi, "SEGMENT", 100)
    cut = best_path(3000, costs, states)
    assert (whole[0] == cut[0]).all() and whole[1] == cut[1]


def test_plain_python_finds_the_same() -> None:
    w = np.random.default_rng(1).laplace(size=200)
    costs = ladder_costs(w, np.ones(200), PRICED)
    expected, _ = best_path(200, costs, 8)
    rest = PRICED.values, PRICED.bits, PRICED.slope, PRICED.lam
    plain = viterbi._on_ladder(w, np.ones(200), *rest)
    for ours, theirs in zip(plain, costs(slice(None)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (viterbi._search(*plain, previous(8), 0) == expected).all()
    assert viterbi._walk(expected, next_states(8), 0) == walk(expected, 8)


def test_a_table_is_a_ladder_that_ends() -> None:
    w = np.random.default_rng(3).standard_normal(300)
    path, _ = best_path(300, table_costs(w, np.ones(300), np.zeros(300), np.arange(-8.0, 9.0)[None]), 8)
    steps = Ladder(np.zeros(1), np.zeros(3), 0.0, 0.0)
    expected, _ = best_path(300, ladder_costs(w, np.ones(300), steps), 8)
    assert (path - 8 == expected).all()


def test_a_path_goes_on_from_a_state() -> None:
    w = np.random.default_rng(2).standard_normal(50)
    first, state = best_path(20, ladder_costs(w[:20], np.ones(20), FREE), 16)
    second, end = best_path(30, ladder_costs(w[20:], np.ones(30), FREE), 16, state)
    assert walk(np.concatenate([first, second]), 16) == end


@pytest.mark.parametrize("states", SIZES)
def test_machines_tell_apart_what_scalars_cannot(states: int) -> None:
    after = next_states(states)
    assert sorted(after.ravel().tolist()) == sorted(2 * list(range(states)))  # two ways into each state
    assert {int(after[way >> 1, way & 1]) for way in previous(states)[3]} == {3}
    # Two paths that part and meet again differ by more than one step of the twice as wide quantizer, 2² = 4.
    gaps = np.array([[min((a - b) % 4, (b - a) % 4) ** 2 for a in range(4)] for b in range(4)])
    least = {(after[s, 0], after[s, 1]): 4 for s in range(states)}
    met = np.inf
    for _ in range(4 * states.bit_length()):
        further: dict[tuple[int, int], int] = {}
        for (a, b), gap in least.items():
            for za, zb in itertools.product((0, 1), repeat=2):
                to = after[a, za], after[b, zb]
                wider = gap + gaps[(a & 1) + 2 * za, (b & 1) + 2 * zb]
                if to[0] == to[1]:
                    met = min(met, wider)
                else:
                    further[to] = min(wider, further.get(to, wider))
        least = further
    assert met == {4: 9, 8: 10, 16: 11, 32: 13, 64: 14, 128: 16, 256: 17}[states]
