"""The least mean squared error at a rate, of independent draws: Shannon's distortion–rate function D(R).

At a slope β the best distribution q of reproductions y minimises

    L(β) = -∑ p(x) log ∑ q(y) exp(-β (x - y)²),

whose fixed-point iteration is Blahut's (1972) and Arimoto's (1972).  It creeps where q has few atoms, as at low rates;
Newton steps on a barrier (Koenker & Mizera 2014, for the same function) reach a gap of 10⁻⁷ nats in a few dozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitbook.errors import PlanError
from bitbook.theory.sources import Gauss, Nodes, Source

TOLERANCE = 1e-7
"""Nats between the solution and a lower bound on it (Blahut 1972, theorem 6)."""

_MOST_STEPS = 200
_CLOSE = 0.003  # bits between a solved rate and the wanted one, which the tangent bridges
_TIGHT = 1e-4  # above the Shannon lower bound, in parts of it; the distance only shrinks as the rate grows


class RatePoint(NamedTuple):
    """One point of the curve and its tangent."""

    bits: float
    mse: float
    slope: float
    """β: nats per unit of squared error."""


def shannon_lower_bound(entropy: float, bits: float) -> float:
    """`2^(2(h - R)) / 2πe`, which no code at R bits is below (Shannon 1959); `entropy` h in bits."""
    return 2 ** (2 * (entropy - bits)) / (2 * math.pi * math.e)


def bounds(source: Source, rates: Sequence[float]) -> list[float]:
    """D(R) at each rate in bits, in squared units of the source; raises `PlanError` for a negative rate."""
    if any(not rate >= 0 for rate in rates):
        raise PlanError(f"rates={list(rates)!r}: a rate is zero bits or more")
    if isinstance(source, Gauss):
        return [source.variance * 2 ** (-2 * rate) for rate in rates]
    found: dict[float, float] = {0.0: source.variance}
    solved: list[RatePoint] = []
    tight = False
    for rate in sorted(set(rates) - {0.0}):
        least = 0.0 if source.entropy is None else shannon_lower_bound(source.entropy, rate)
        found[rate] = least if tight else min(max(_at(source, rate, solved), least), source.variance)
        tight = found[rate] <= least * (1 + _TIGHT)
    return [found[rate] for rate in rates]


def _at(source: Source, rate: float, solved: list[RatePoint]) -> float:
    """D at `rate`: the slope is searched, from the points that were `solved` before, and the last step is a tangent."""
    for _ in range(12):
        near = min(solved, key=lambda point: abs(point.bits - rate), default=None)
        if near is not None and abs(near.bits - rate) < _CLOSE:
            break
        solved.append(solve(source, _next_slope(source.variance, rate, solved)))
    near = min(solved, key=lambda point: abs(point.bits - rate))
    return near.mse + (near.bits - rate) * math.log(2) / near.slope


def _next_slope(variance: float, rate: float, solved: list[RatePoint]) -> float:
    """Between points on both sides a straight line in log β, else as for Gauss from the nearest."""
    below = max((p for p in solved if p.bits < rate), key=lambda p: p.bits, default=None)
    above = min((p for p in solved if p.bits >= rate), key=lambda p: p.bits, default=None)
    if below is not None and above is not None and above.bits - below.bits > 1e-6:
        share = (rate - below.bits) / (above.bits - below.bits)
        share = min(max(share, 0.02), 0.98)
        return below.slope ** (1 - share) * above.slope**share
    near = below or above
    if near is None:
        return 2 ** (2 * rate) / (2 * variance)
    return near.slope * 4 ** (rate - near.bits)


def solve(source: Source, slope: float) -> RatePoint:
    """The point of the curve where one nat buys `1 / slope` of squared error."""
    noise = math.sqrt(1 / (2 * slope))
    nodes = source.nodes(noise)
    y = _reproductions(nodes, noise, source.symmetric)
    return _solve(nodes, y, slope, source.symmetric)


def _reproductions(nodes: Nodes, noise: float, symmetric: bool) -> np.ndarray:
    """Where q may have mass: a grid within the core, and the points beyond."""
    low, high = nodes.core
    # Atoms of a sparse q must be met closely, a dense one is smooth at half the noise.
    distance = min(max((high - low) / (300 if symmetric else 600), noise / 6), noise / 2)
    grid = np.linspace(low, high, max(math.ceil((high - low) / distance), 1) + 1)
    x = nodes.x
    return np.concatenate([x[x < low], grid, x[x > high]])


def _solve(nodes: Nodes, y: np.ndarray, slope: float, symmetric: bool) -> RatePoint:
    square = np.square(nodes.x[:, None] - y)
    kernel = np.exp(-slope * square)
    weighted = kernel * square
    if symmetric:  # y stands for y and −y
        mirrored = np.square(nodes.x[:, None] + y)
        other = np.exp(-slope * mirrored)
        weighted = (weighted + other * mirrored) / 2
        kernel = (kernel + other) / 2
    q = mixture(kernel, nodes.p)
    output = kernel @ q
    mse = float((nodes.p / output) @ (weighted @ q))
    nats = -slope * mse - float(nodes.p @ np.log(output))
    return RatePoint(max(nats, 0.0) / math.log(2), mse, slope)


def mixture(kernel: np.ndarray, p: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """`q` (m,) ≥ 0, of sum one, that minimises `-∑ p log(kernel @ q)`; `kernel` (n, m), `p` (n,).

    With the penalty `∑ q` the minimum sums to one by itself, so that only `q ≥ 0` needs a barrier.
    """
    n = kernel.shape[1]
    q = np.full(n, 1 / n)
    dual = np.ones(n)
    for _ in range(_MOST_STEPS):
        output = kernel @ q
        ratio = kernel.T @ (p / output)
        total = q.sum()
        if math.log(max(ratio.max() * total, 1.0)) < tolerance:  # Blahut's lower bound is this far away
            break
        barrier = 0.1 * float(q @ dual) / n
        rows = kernel * (np.sqrt(p) / output)[:, None]
        hessian = rows.T @ rows
        hessian[np.diag_indices(n)] += dual / q
        step = np.linalg.solve(hessian, ratio - 1 + barrier / q)
        dual_step = barrier / q - dual - dual / q * step
        length = min(1.0, 0.995 * _longest(q, step), 0.995 * _longest(dual, dual_step))
        q, dual = q + length * step, dual + length * dual_step
    return q / q.sum()


def _longest(value: np.ndarray, step: np.ndarray) -> float:
    """How far `value` may go along `step` and stay positive."""
    falling = step < 0
    return float((-value[falling] / step[falling]).min()) if falling.any() else math.inf
