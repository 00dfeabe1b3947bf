"""The search for the best path through a trellis (Viterbi 1967; Marcellin & Fischer 1990), with bits in its metric.

    weights in path order ──► per weight: the best level of each subset ──► survivors of all states ──► levels

A path is cut into segments: each is searched a little beyond its end, where all survivors have one past in common, and
goes on from the state reached.  So memory does not grow with the number of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from bitbook.compiling import compiler
from bitbook.trellis.machine import next_states, previous

SEGMENT = 1 << 15
"""Weights that are searched together."""
_BEYOND = 1024  # weights; survivors nearly always share their past much sooner
_REACH = 4  # levels on either side of the nearest that are looked at: each subset is there twice at least
_FAR = 1e300  # the cost of what cannot be
_MOST = 1 << 30


@dataclass(frozen=True, eq=False)
class Ladder:
    """What levels without a bound stand for, and what they cost."""

    values: Float[np.ndarray, " levels"]
    """Ascending, of the levels from -k to k; beyond them they go on in ones."""
    bits: Float[np.ndarray, " priced"]
    """Of the levels from -m to m, each among those of its parity; m is 1 or more."""
    slope: float
    """Bits for each step of two beyond `bits`."""
    lam: float
    """Squared error per bit."""


class Costs(Protocol):
    """What each weight of a part of the path would cost at the best level of each subset, and which level that is."""

    def __call__(self, part: slice) -> tuple[Float[np.ndarray, "n 4"], Int[np.ndarray, "n 4"]]: ...


def best_path(n: int, costs: Costs, states: int, start: int = 0) -> tuple[Int[np.ndarray, " n"], int]:
    """The cheapest levels of n weights from the state `start` on, in path order, and the state after them.

    Ties go to the survivor of the lower state.
    """
    out = np.empty(n, np.int32)
    state = start
    for first in range(0, n, SEGMENT):
        kept = min(SEGMENT, n - first)
        found = _loops().search(*costs(slice(first, first + kept + _BEYOND)), previous(states), state)
        out[first : first + kept] = found[:kept]
        state = walk(found[:kept], states, state)
    return out, state


def ladder_costs(w: Float[np.ndarray, " n"], weight: Float[np.ndarray, " n"], ladder: Ladder) -> Costs:
    """Weighted squared error plus λ · bits on a ladder, in path order: weights, and the importance of each."""
    w, weight = np.ascontiguousarray(w, np.float64), np.ascontiguousarray(weight, np.float64)
    values, bits = np.ascontiguousarray(ladder.values, np.float64), np.ascontiguousarray(ladder.bits, np.float64)

    def costs(part: slice) -> tuple[np.ndarray, np.ndarray]:
        return _loops().on_ladder(w[part], weight[part], values, bits, ladder.slope, ladder.lam)

    return costs


def table_costs(
    w: Float[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    block: Int[np.ndarray, " n"],
    values: Float[np.ndarray, "blocks levels"],
) -> Costs:
    """Weighted squared error on a table of ascending values for each block, all in path order."""
    w, weight = np.ascontiguousarray(w, np.float64), np.ascontiguousarray(weight, np.float64)
    block, values = np.ascontiguousarray(block, np.int64), np.ascontiguousarray(values, np.float64)

    def costs(part: slice) -> tuple[np.ndarray, np.ndarray]:
        return _loops().on_table(w[part], weight[part], block[part], values)

    return costs


def walk(levels: Int[np.ndarray, " n"], states: int, start: int = 0) -> int:
    """The state after `levels`, in path order; -1 where one of them may not follow."""
    return int(_loops().walk(np.ascontiguousarray(levels, np.int32), next_states(states), start))


def states_before(choices: Int[np.ndarray, " n"], states: int) -> Int[np.ndarray, " n"]:
    """The state in which each of `choices`, zeros and ones in path order, is made; the first is 0."""
    return _loops().states(np.ascontiguousarray(choices, np.int32), next_states(states))


@dataclass(frozen=True)
class _Loops:
    search: Callable[..., Any]
    on_ladder: Callable[..., Any]
    on_table: Callable[..., Any]
    walk: Callable[..., Any]
    states: Callable[..., Any]


@functools.cache
def _loops() -> _Loops:
    """Compiled where numba is there, else plain Python: the same numbers, slower."""
    loops, compile = (_search, _on_ladder, _on_table, _walk, _states), compiler()
    return _Loops(*loops) if compile is None else _Loops(*map(compile, loops))


def _walk(levels, after, state):
    for j in levels:
        if (j ^ state) & 1:
            return np.int64(-1)
        state = after[state, (j - (state & 1)) >> 1 & 1]
    return np.int64(state)


def _states(choices, after):
    found = np.empty(len(choices), np.int32)
    state = np.int64(0)
    for i in range(len(choices)):
        found[i] = state
        state = after[state, choices[i]]
    return found


def _on_ladder(w, weight, values, bits, slope, lam):
    n, size, most = len(w), len(values) // 2, len(bits) // 2
    cost = np.full((n, 4), np.inf)
    chosen = np.zeros((n, 4), np.int32)
    for t in range(n):
        x = w[t]
        if x > values[2 * size]:
            nearest = size + int(min(np.floor(x - values[2 * size] + 0.5), _MOST))
        elif x < values[0]:
            nearest = -size - int(min(np.floor(values[0] - x + 0.5), _MOST))
        else:
            nearest = -size
            while nearest < size and x > (values[nearest + size] + values[nearest + size + 1]) * 0.5:
                nearest += 1
        # A price may ask for the smallest levels of all, far from the nearest.
        first = -2 if lam > 0 and abs(nearest) > _REACH else 3
        for k in range(first, 3 + 2 * _REACH + 1):
            j = k if k < 3 else nearest - _REACH + k - 3
            if j > size:
                error = x - values[2 * size] - (j - size)
            elif j < -size:
                error = x - values[0] - (j + size)
            else:
                error = x - values[j + size]
            price = error * error * weight[t]
            size_j = abs(j)
            if lam > 0:
                steps = max((size_j - most + 1) // 2, 0)  # of two, beyond the table
                within = j - 2 * steps if j > 0 else j + 2 * steps
                price += lam * (bits[within + most] + steps * slope)
            d = j & 3
            if price < cost[t, d] or (price == cost[t, d] and size_j < abs(chosen[t, d])):
                cost[t, d] = price
                chosen[t, d] = j
    return cost, chosen


def _on_table(w, weight, block, values):
    n, count = len(w), values.shape[1]
    cost = np.full((n, 4), np.inf)
    chosen = np.zeros((n, 4), np.int32)
    for t in range(n):
        row = values[block[t]]
        nearest = np.searchsorted(row, w[t])
        for j in range(max(nearest - _REACH, 0), min(nearest + _REACH + 1, count)):
            error = w[t] - row[j]
            price = error * error * weight[t]
            if price < cost[t, j & 3]:
                cost[t, j & 3] = price
                chosen[t, j & 3] = j
    return cost, chosen


def _search(costs, chosen, into, start):
    n, states = len(costs), len(into)
    from_first, from_second = np.empty(states, np.int64), np.empty(states, np.int64)
    by_first, by_second = np.empty(states, np.int64), np.empty(states, np.int64)
    for s in range(states):
        from_first[s], from_second[s] = into[s, 0] >> 1, into[s, 1] >> 1
        # the subset of a branch: its state's parity, and its choice
        by_first[s] = (from_first[s] & 1) + 2 * (into[s, 0] & 1)
        by_second[s] = (from_second[s] & 1) + 2 * (into[s, 1] & 1)
    second = np.empty((n, states), np.bool_)  # whether the survivor came by the second way
    cost = np.full(states, _FAR)
    cost[start] = 0.0
    fresh = np.empty(states)
    for t in range(n):
        subset = costs[t]
        least = np.inf
        for s in range(states):
            a = cost[from_first[s]] + subset[by_first[s]]
            b = cost[from_second[s]] + subset[by_second[s]]
            other = b < a
            second[t, s] = other
            a = b if other else a
            fresh[s] = a
            least = min(least, a)
        for s in range(states):
            cost[s] = fresh[s] - least

    s = 0
    for k in range(states):
        if cost[k] < cost[s]:
            s = k
    found = np.empty(n, np.int32)
    for t in range(n - 1, -1, -1):
        way = into[s, 1] if second[t, s] else into[s, 0]
        s = way >> 1
        found[t] = chosen[t, (s & 1) + 2 * (way & 1)]
    return found
