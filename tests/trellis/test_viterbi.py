from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbook.trellis import viterbi
from bitbook.trellis.machine import SIZES, next_states, previous
from bitbook.trellis.viterbi import Levels, best_path, walk

PRICED = Levels(np.array([[0.8, 1.7]]), np.array([0.4, 1.3, 3.0, 2.8]), 2.0, 0.3)
FREE = Levels(np.array([[0.8, 1.7]]), np.zeros(2), 0.0, 0.0)


def value(j: int, levels: Levels, block: int = 0) -> float:
    points = [0.0, *levels.points[block]]
    size = abs(j)
    last = len(points) - 1
    found = points[size] if size <= last else points[last] + (size - last) * (points[last] - points[last - 1])
    return found if j >= 0 else -found


def bits(j: int, levels: Levels) -> float:
    size, steps = abs(j), 0
    while size >= len(levels.bits):
        size, steps = size - 2, steps + 1
    return float(levels.bits[size]) + steps * levels.slope


def cost(w, weight, path, levels: Levels) -> float:  # type: ignore[no-untyped-def]
    pairs = zip(w, weight, path, strict=True)
    return sum(m * (x - value(j, levels)) ** 2 + levels.lam * bits(j, levels) for x, m, j in pairs)


def cheapest(w, weight, levels: Levels, states: int) -> float:  # type: ignore[no-untyped-def]
    """Every path that may be, one after the other."""
    paths = itertools.product(range(-7, 8), repeat=len(w))
    return min(cost(w, weight, path, levels) for path in paths if walk(np.array(path), states) >= 0)


@settings(max_examples=10)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=4), st.sampled_from([4, 8]), st.booleans())
def test_no_path_is_better(w: list[float], states: int, priced: bool) -> None:
    levels = PRICED if priced else FREE
    weight = np.linspace(0.5, 2, len(w))
    path, state = best_path(np.array(w), weight, np.zeros(len(w)), levels, states)
    assert state == walk(path, states) >= 0
    assert cost(w, weight, path, levels) == pytest.approx(cheapest(w, weight, levels, states), abs=1e-9)


@pytest.mark.parametrize("states", SIZES)
def test_segments_change_nothing(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).standard_normal(3000)
    rest = np.ones(3000), np.zeros(3000), PRICED, states
    whole = best_path(w, *rest)
    monkeypatch.setattr(viterbi, "_SEGMENT", 100)
    cut = best_path(w, *rest)
    assert (whole[0] == cut[0]).all() and whole[1] == cut[1]


def test_plain_python_finds_the_same() -> None:
    w = np.random.default_rng(1).laplace(size=200)
    expected, _ = best_path(w, np.ones(200), np.zeros(200), PRICED, 8)
    points, into = np.asarray(PRICED.points), previous(8)
    arguments = w, np.ones(200), np.zeros(200, int), points, PRICED.bits, PRICED.slope, PRICED.lam, into, 0
    assert (viterbi._search(*arguments) == expected).all()
    assert viterbi._walk(expected, next_states(8), 0) == walk(expected, 8)


def test_a_path_goes_on_from_a_state() -> None:
    w = np.random.default_rng(2).standard_normal(50)
    first, state = best_path(w[:20], np.ones(20), np.zeros(20), FREE, 16)
    second, end = best_path(w[20:], np.ones(30), np.zeros(30), FREE, 16, state)
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
