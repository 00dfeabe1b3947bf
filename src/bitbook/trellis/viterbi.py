"""The search for the best path through a trellis (Viterbi 1967; Marcellin & Fischer 1990), with bits in its metric.

    weights in path order ──► per weight: the best level of each subset ──► survivors of all states ──► levels

A path is cut into segments: each is searched a little beyond its end, where all survivors have one past in common, and
goes on from the state reached.  So memory does not grow with the number of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bitbook.trellis.machine import next_states, previous

_SEGMENT = 1 << 15
_BEYOND = 1024  # weights; survivors nearly always share their past much sooner
_REACH = 4  # levels on either side of the nearest that are looked at: each subset is there twice
_FAR = 1e300  # the cost of what cannot be
_MOST = 1 << 30


@dataclass(frozen=True, eq=False)
class Levels:
    """What levels stand for, and what they cost."""

    points: Float[np.ndarray, "blocks size"]
    """Ascending values of the levels 1, 2, … of each block; beyond them they go on at the last distance."""
    bits: Float[np.ndarray, " magnitudes"]
    """Of each magnitude among those of its parity, sign included, from 0 on."""
    slope: float
    """Bits for each step of two beyond `bits`."""
    lam: float
    """Squared error per bit."""


def best_path(
    w: Float[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    block: Int[np.ndarray, " n"],
    levels: Levels,
    states: int,
    start: int = 0,
) -> tuple[Int[np.ndarray, " n"], int]:
    """The levels with the least weighted squared error plus λ · bits from the state `start` on, and the state after.

    All in path order: weights, the importance of each, and the block whose points it takes.  Ties go to the survivor
    of the lower state, and to the smaller level.
    """
    out = np.empty(len(w), np.int32)
    w, weight = np.ascontiguousarray(w, np.float64), np.ascontiguousarray(weight, np.float64)
    block = np.ascontiguousarray(block, np.int64)
    points = np.ascontiguousarray(levels.points, np.float64)
    bits = np.ascontiguousarray(levels.bits, np.float64)
    search, after, into = _loops().search, next_states(states), previous(states)
    state = start
    for first in range(0, len(w), _SEGMENT):
        kept = min(_SEGMENT, len(w) - first)
        part = slice(first, first + kept + _BEYOND)
        found = search(w[part], weight[part], block[part], points, bits, levels.slope, levels.lam, into, state)
        out[first : first + kept] = found[:kept]
        state = int(_loops().walk(found[:kept], after, state))
    return out, state


def walk(levels: Int[np.ndarray, " n"], states: int, start: int = 0) -> int:
    """The state after `levels`, in path order; -1 where one of them may not follow."""
    return int(_loops().walk(np.ascontiguousarray(levels, np.int32), next_states(states), start))


@dataclass(frozen=True)
class _Loops:
    search: Callable[..., Any]
    walk: Callable[..., Any]


@functools.cache
def _loops() -> _Loops:
    try:
        from numba import njit
    except ImportError:
        return _Loops(_search, _walk)
    compile: Any = njit(nogil=True, cache=True, error_model="numpy")
    return _Loops(compile(_search), compile(_walk))


def _walk(levels, after, state):
    for j in levels:
        if (j ^ state) & 1:
            return np.int64(-1)
        state = after[state, (j - (state & 1)) >> 1 & 1]
    return np.int64(state)


def _search(w, weight, block, points, bits, slope, lam, into, start):
    n, states, size = len(w), len(into), points.shape[1]
    from_first, from_second = np.empty(states, np.int64), np.empty(states, np.int64)
    by_first, by_second = np.empty(states, np.int64), np.empty(states, np.int64)
    for s in range(states):
        from_first[s], from_second[s] = into[s, 0] >> 1, into[s, 1] >> 1
        # the subset of a branch: its state's parity, and its choice
        by_first[s] = (from_first[s] & 1) + 2 * (into[s, 0] & 1)
        by_second[s] = (from_second[s] & 1) + 2 * (into[s, 1] & 1)
    chosen = np.empty((n, 4), np.int32)  # the best level of each subset
    second = np.empty((n, states), np.bool_)  # whether the survivor came by the second way
    cost = np.full(states, _FAR)
    cost[start] = 0.0
    fresh = np.empty(states)
    subset = np.empty(4)
    tabled = len(bits)

    for t in range(n):
        x, p = w[t], points[block[t]]
        last = p[size - 1]
        distance = last - (p[size - 2] if size > 1 else 0.0)
        size_x = abs(x)
        nearest = 0
        if distance > 0 and size_x > last:
            nearest = size + int(min(np.floor((size_x - last) / distance + 0.5), _MOST))
        else:
            below = 0.0
            while nearest < size and p[nearest] > 0 and size_x > (below + p[nearest]) * 0.5:
                below = p[nearest]
                nearest += 1
        if x < 0:
            nearest = -nearest
        for k in range(4):
            subset[k] = _FAR
        # A price may ask for the smallest levels of all, far from the nearest.
        first = -2 if lam > 0 and abs(nearest) > _REACH else 3
        for k in range(first, 3 + 2 * _REACH + 1):
            j = k if k < 3 else nearest - _REACH + k - 3
            size_j = abs(j)
            value = 0.0
            if size_j > size:
                value = last + (size_j - size) * distance
            elif size_j > 0:
                value = p[size_j - 1]
            error = x - (value if j > 0 else -value)
            price = error * error * weight[t]
            if lam > 0:
                b = (
                    bits[size_j]
                    if size_j < tabled
                    else (bits[tabled - 2 + ((size_j - tabled) & 1)] + ((size_j - tabled) // 2 + 1) * slope)
                )
                price += lam * b
            d = j & 3
            if price < subset[d] or (price == subset[d] and size_j < abs(chosen[t, d])):
                subset[d] = price
                chosen[t, d] = j
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
