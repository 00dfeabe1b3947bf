"""Optimal k-means on a line: the best of all partitions of weighted scalars, by dynamic programming.

    values ─sort, merge equals─► prefix sums ─k/2 layers from either end─► boundaries ─► means, ascending

Optimal clusters are intervals (Fisher 1958), so `D_q(j) = min_i D_{q-1}(i) + cost(i, j)` is the least cost of the first
j values in q clusters.  The best i grows with j, so that each layer narrows its rows' ranges by halves, in O(n log n)
(Grønlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering in 1D").  Layers from the left
meet as many from the right, and neither goes on where its cost alone exceeds that of a partition which is known: the
best of those whose boundaries are multiples of `COARSE`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from bitbook.compiling import compiler

TABLE_BYTES = 256 << 20
"""The boundaries of all layers are kept up to this size; beyond, halves are solved anew, in twice the time."""
COARSE = 32
LANES = 64
"""Candidates that are priced before any is compared: a loop without branches is vectorised."""


def optimal_centroids(
    values: np.ndarray, k: int, weights: np.ndarray | None = None, *, table_bytes: int = TABLE_BYTES
) -> np.ndarray:
    """The `min(k, distinct values)` centroids, ascending float32, with the least `sum_i w_i (x_i - c_i)^2`.

    Costs are float64, to about 2^-53 (|x - median| / width)^2 of a cluster's own.

    Args:
        values: `(n,)` float32, finite.
        k: number of clusters, at least 1.
        weights: `(n,)`, none negative, some positive; values of weight zero count for nothing.
        table_bytes: what the table of boundaries may take.
    """
    distinct, mass = _merged(values, weights)
    center = float(distinct[np.searchsorted(np.cumsum(mass), mass.sum() / 2)])
    sums = _prefix(distinct.astype(np.float64) - center, mass)
    starts = [0, *_boundaries(sums, min(k, len(distinct)), table_bytes)]
    # Not from the sums about the median, which may have lost a small value beside a large one.
    moments, weight = np.add.reduceat(mass * distinct, starts), np.add.reduceat(mass, starts)
    return (moments / weight).astype(np.float32)


def _merged(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and the sum of the weights of each."""
    if weights is None:
        x, mass = np.sort(values), np.ones(0)
    else:
        values, weights = values[weights > 0], weights[weights > 0]
        order = np.argsort(values, kind="stable")
        x, mass = values[order], weights[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
    if weights is None:
        return x[starts], np.diff(starts, append=len(x)).astype(np.float64)
    return x[starts], np.add.reduceat(mass, starts)


def _prefix(x: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """(6, n + 1) running sums of `mass`, `mass · x` and `mass · x²`, and below them what their rounding lost.

    With it, a difference of two sums is as precise as a sum of its own, whatever came before.
    """
    sums = np.zeros((6, len(x) + 1))
    for row, terms in enumerate((mass, mass * x, mass * x * x)):
        total = np.cumsum(terms)
        before = np.concatenate([[0.0], total[:-1]])
        back = total - before
        sums[row, 1:] = total
        sums[row + 3, 1:] = np.cumsum((before - (total - back)) + (terms - back))  # Knuth's two-sum
    return sums


def _between(sums: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(3, clusters) sums of `mass`, `mass · x` and `mass · x²` between neighbours of `ends`."""
    return np.diff(sums[:3, ends]) + np.diff(sums[3:, ends])


def _cost(sums: np.ndarray, ends: np.ndarray) -> float:
    weight, moment, square = _between(sums, ends)
    return float((square - moment * moment / weight).sum())


def _boundaries(sums: np.ndarray, k: int, table_bytes: int) -> list[int]:
    """Where the clusters 2, …, k of all values that `sums` is about begin."""
    n = sums.shape[1] - 1
    if k == 1 or n == k:
        return list(range(1, k))
    bound = np.inf
    if n > 4 * COARSE * k:
        places = np.append(np.arange(0, n, COARSE), n)
        known = places[_boundaries(sums[:, places], k, table_bytes)]
        bound = _cost(sums, np.array([0, *known, n]))
        bound += 2.0**-30 * bound + 2.0**-40 * _cost(sums, np.array([0, n]))  # rounding must not exclude the best
    half, keep = k // 2, 4 * k * (n + 1) <= table_bytes
    mirrored = -sums[:, ::-1]  # only differences count
    left, left_table = _sweep(sums, half, n - k + half, bound, keep)
    right, right_table = _sweep(mirrored, k - half, n - half, bound, keep)
    cut = int((left + right[::-1]).argmin())
    if keep:
        before, after = _trace(left_table, cut), _trace(right_table, n - cut)
        return [*before[::-1], cut, *(n - place for place in after)]
    before = _boundaries(sums[:, : cut + 1].copy(), half, table_bytes)
    after = _boundaries(sums[:, cut:].copy(), k - half, table_bytes)
    return [*before, cut, *(cut + place for place in after)]


def _sweep(sums: np.ndarray, layers: int, last: int, bound: float, keep: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """The least cost of the first j values in `layers` clusters, for each j; and, of all layers, the best i.

    Infinite for more than `last` values, and beyond `bound`.
    """
    first, layer = _loops()
    before, after = np.empty(sums.shape[1]), np.empty(sums.shape[1])
    high = first(sums, before, last - layers + 1, bound)
    table: list[np.ndarray] = []
    for q in range(2, layers + 1):
        split = np.empty(sums.shape[1], np.int32)
        high = layer(sums, before, after, split, q, high, last - layers + q, bound)
        before, after = after, before
        if keep:
            table.append(split)
    return before, table


def _trace(table: list[np.ndarray], end: int) -> list[int]:
    """Where the clusters of the first `end` values begin, the last one first, without the 0."""
    found: list[int] = []
    for split in reversed(table):
        end = int(split[end])
        found.append(end)
    return found


@functools.cache
def _loops() -> tuple[Callable[..., int], Callable[..., int]]:
    """The first layer, and any other; compiled where numba is there, else plain Python: the same numbers, slower."""
    compile = compiler()
    return (_first, _layer) if compile is None else (compile(_first), compile(_layer))


def _first(sums, cost, last, bound):
    """Write the cost of each row in one cluster, infinite beyond `last` and `bound`; returns the last row within."""
    cost[:] = np.inf
    for j in range(1, last + 1):
        weight = (sums[0, j] - sums[0, 0]) + (sums[3, j] - sums[3, 0])
        moment = (sums[1, j] - sums[1, 0]) + (sums[4, j] - sums[4, 0])
        square = (sums[2, j] - sums[2, 0]) + (sums[5, j] - sums[5, 0])
        found = square - moment * moment / weight
        if found > bound:
            return j - 1
        cost[j] = found
    return last


def _layer(sums, before, after, split, q, reach, last, bound):
    """Write the least cost of each row in q clusters, and where the last of them begins; returns the last row within.

    Rows go from q to `last`; `reach` is the last row of `before` that is finite, and no cost beyond `bound` counts.
    """
    priced = np.empty(LANES)
    after[:] = np.inf
    rows = last - q + 1
    high = last
    stride = 1
    while 2 * stride <= rows:
        stride *= 2
    while stride > 0:
        for place in range(stride, rows + 1, 2 * stride):  # between two rows of the strides before
            j = q + place - 1
            if j > high:
                break
            i = split[j - stride] if place > stride else q - 1
            end = min(j - 1, reach)
            if place + stride <= rows and j + stride <= high:
                end = min(end, split[j + stride])
            m, s, t = sums[0, j], sums[1, j], sums[2, j]
            dm, ds, dt = sums[3, j], sums[4, j], sums[5, j]
            best, begin = np.inf, i
            while i <= end:
                count = min(LANES, end - i + 1)
                for p in range(count):
                    c = i + p
                    weight = (m - sums[0, c]) + (dm - sums[3, c])
                    moment = (s - sums[1, c]) + (ds - sums[4, c])
                    square = (t - sums[2, c]) + (dt - sums[5, c])
                    priced[p] = before[c] + (square - moment * moment / weight)
                for p in range(count):
                    if priced[p] < best:
                        best, begin = priced[p], i + p
                i += count
            after[j], split[j] = best, begin
            if best > bound:
                high = j - 1
        stride //= 2
    after[high + 1 :] = np.inf
    return high
