"""The inner loops of k-means: nearest codewords, sums by label, distances to a few points.

Each is written twice: for numba, and in numpy, which is slower, gives the same labels and serves where numba is
missing.  Points are `(n, d)` float32 with d a multiple of four (filled up with zeros), distances are float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = 128  # points that are compared with a codeword at a time: a few vector registers


@dataclass(frozen=True)
class Kernels:
    """The inner loops, compiled or not."""

    nearest: tuple[Callable[..., None], Callable[..., None]]  # without, with weights of coordinates
    sums: Callable[..., tuple[np.ndarray, np.ndarray]]
    closer: Callable[..., np.ndarray]


@functools.cache
def kernels() -> Kernels:
    """Compiled by numba, or, where that is missing, by numpy: the same labels, slower."""
    try:
        from numba import njit
    except ImportError:
        return Kernels((_nearest_numpy, _nearest_numpy), _sums_numpy, _closer_numpy)
    compiled: Any = njit(nogil=True, cache=True)
    return Kernels((compiled(_nearest(False)), compiled(_nearest(True))), compiled(_sums), compiled(_closer))


def _nearest(weighted: bool) -> Callable[..., None]:
    """The kernel, with or without a metric: as a constant of the compiled code `weighted` costs nothing."""

    def nearest(points, metric, codewords, drift, labels, lower, costs, chunk_bytes):
        """Write labels, costs and lower bounds of distances to other codewords (zero where weighted).

        `LANES` points at a time are compared in float32. Its error is relative, since all terms are positive;
        only where the two best are too close for that does float64 decide.
        """
        n, d = points.shape
        k = len(codewords)
        error = (d + 8) * 2.0**-24

        def exact(i, j):
            total, odd = 0.0, 0.0  # two sums, so that an addition need not wait for the one before
            for q in range(0, d, 2):
                u = np.float64(points[i, q]) - codewords[j, q]
                v = np.float64(points[i, q + 1]) - codewords[j, q + 1]
                if weighted:
                    total += metric[i, q] * (u * u)
                    odd += metric[i, q + 1] * (v * v)
                else:
                    total += u * u
                    odd += v * v
            return total + odd

        block = np.zeros((d, LANES), np.float32)
        scale = np.ones((d, LANES), np.float32)
        pairs = np.full((k + k % 2, d), np.inf, np.float32)  # two at a time share loads and stores
        pairs[:k] = codewords

        def quad(j, q, p):
            u, v = block[q, p] - pairs[j, q], block[q + 1, p] - pairs[j, q + 1]
            x, y = block[q + 2, p] - pairs[j, q + 2], block[q + 3, p] - pairs[j, q + 3]
            u, v, x, y = u * u, v * v, x * x, y * y
            if weighted:
                u, v, x, y = scale[q, p] * u, scale[q + 1, p] * v, scale[q + 2, p] * x, scale[q + 3, p] * y
            return (u + v) + (x + y)

        waiting, count = np.empty(n, np.int64), 0
        for i in range(n):
            lower[i] -= drift[labels[i]]
            costs[i] = exact(i, labels[i])
            if not math.sqrt(costs[i]) * (1 + 1e-9) < lower[i]:
                waiting[count] = i
                count += 1

        last = d - 4
        zero = np.float32(0)
        left, right, winner = (
            np.zeros(LANES, np.float32),
            np.zeros(LANES, np.float32),
            np.zeros(LANES, np.int32),
        )
        best, second = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for start in range(0, count, LANES):
            rows = waiting[start : min(start + LANES, count)]
            for p in range(len(rows)):
                for q in range(d):
                    block[q, p] = points[rows[p], q]
                    if weighted:
                        scale[q, p] = metric[rows[p], q]
            best[:] = np.inf
            second[:] = np.inf
            for j in range(0, k, 2):
                index, after = np.int32(j), np.int32(j + 1)
                for q in range(0, last, 4):
                    for p in range(LANES):
                        left[p] = quad(j, q, p) + (left[p] if q > 0 else zero)
                        right[p] = quad(j + 1, q, p) + (right[p] if q > 0 else zero)
                for p in range(LANES):
                    x, y = left[p] + quad(j, last, p), right[p] + quad(j + 1, last, p)
                    swap = y < x
                    near, far = (y, x) if swap else (x, y)
                    least, other = best[p], second[p]
                    nearer = near < least
                    middle = least if nearer else near
                    other = middle if middle < other else other
                    second[p] = far if far < other else other
                    best[p] = near if nearer else least
                    winner[p] = (after if swap else index) if nearer else winner[p]
            for p in range(len(rows)):
                i, label = rows[p], np.int64(winner[p])
                runner_up = np.float64(second[p]) * (1 - error)
                if np.float64(best[p]) * (1 + 4 * error) + 1e-35 < runner_up < np.inf:
                    if label != labels[i]:
                        costs[i] = exact(i, label)
                else:
                    least, runner_up = np.inf, np.inf
                    for j in range(k):
                        cost = exact(i, j)
                        if cost < least:
                            runner_up, least, label = least, cost, j
                        elif cost < runner_up:
                            runner_up = cost
                    costs[i] = least
                labels[i] = label
                lower[i] = 0.0 if weighted else math.sqrt(runner_up) * (1 - 1e-12)

    return nearest


def _nearest_numpy(points, metric, codewords, drift, labels, lower, costs, chunk_bytes):
    """`_nearest` without numba: every distance in float64."""
    step = max(1, chunk_bytes // (16 * codewords.size))
    for start in range(0, len(points), step):
        rows = slice(start, start + step)
        square = (points[rows, None].astype(np.float64) - codewords) ** 2  # (step, k, width)
        distance = (metric[rows, None] * square if len(metric) else square).sum(-1)
        labels[rows] = distance.argmin(1)
        costs[rows] = distance.min(1)


def _sums(points, metric, mass, labels, k):
    """(k, width) weighted sums of the points of each label, and (k, width) sums of the weights."""
    n, d = points.shape
    sums, total = np.zeros((k, d)), np.zeros((k, d if len(metric) else 1))
    for i in range(n):
        label = labels[i]
        if len(metric):
            for q in range(d):
                weight = mass[i] * metric[i, q]
                sums[label, q] += weight * points[i, q]
                total[label, q] += weight
        else:
            for q in range(d):
                sums[label, q] += mass[i] * points[i, q]
            total[label, 0] += mass[i]
    return sums, total


def _sums_numpy(points, metric, mass, labels, k):
    """`_sums` without numba; `np.add.at` keeps the order of the points."""
    weights = mass[:, None] * (metric if len(metric) else np.ones((len(points), 1)))
    sums, total = np.zeros((k, points.shape[1])), np.zeros((k, weights.shape[1]))
    np.add.at(sums, labels, weights * points)
    np.add.at(total, labels, weights)
    return sums, total


def _closer(columns, metric, closest, picks):
    """(len(picks), n) lesser of `closest` and the squared distance to each pick; `columns` is (d, n)."""
    d, n = columns.shape
    out = np.zeros((len(picks), n))
    for t in range(len(picks)):
        row = out[t]
        for q in range(d):
            column = columns[q]
            centre = column[picks[t]]
            if metric.size:
                weights = metric[q]
                for i in range(n):
                    gap = column[i] - centre
                    row[i] += weights[i] * (gap * gap)
            else:
                for i in range(n):
                    gap = column[i] - centre
                    row[i] += gap * gap
        for i in range(n):
            row[i] = min(row[i], closest[i])
    return out


def _closer_numpy(columns, metric, closest, picks):
    """`_closer` without numba, in the same order."""
    out = np.zeros((len(picks), columns.shape[1]))
    for q in range(len(columns)):
        gap = columns[q] - columns[q, picks][:, None]
        out += metric[q] * (gap * gap) if metric.size else gap * gap
    return np.minimum(out, closest)
