"""The least mean squared error at a rate, of independent draws: Shannon's distortion–rate function D(R).

At a slope β the best distribution q of reproductions y minimises

    L(β) = -∑ p(x) log ∑ q(y) exp(-β (x - y)²),

whose fixed-point iteration is Blahut's (1972) and Arimoto's (1972).  It creeps where q has few atoms, as at low rates;
Newton steps on a barrier (Koenker & Mizera 2014, for the same function) reach a gap of 10⁻⁶ nats in a few dozen.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bitbook.errors import PlanError
from bitbook.theory.sources import Gauss, Nodes, Source

TOLERANCE = 1e-6
"""Nats between the solution and a lower bound on it (Blahut 1972, theorem 6)."""

_MOST_STEPS = 200
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


@dataclass(frozen=True, eq=False)
class DistortionRate:
    """D(R) between solved points, by cubics in log D that keep their tangents; 6.02 dB a bit beyond the last."""

    points: tuple[RatePoint, ...]
    entropy: float | None = None

    def __call__(self, bits: float) -> float:
        """The bound in squared units of the source; raises `PlanError` for a negative rate."""
        if not bits >= 0:
            raise PlanError(f"bits={bits!r}: a rate is zero bits or more")
        last = self.points[-1]
        found = last.mse * 4 ** (last.bits - bits) if bits >= last.bits else self._between(bits)
        return found if self.entropy is None else max(found, shannon_lower_bound(self.entropy, bits))

    def _between(self, bits: float) -> float:
        i = max(bisect_right([p.bits for p in self.points], bits) - 1, 0)
        low, high = self.points[i], self.points[i + 1]
        width = high.bits - low.bits
        t = (bits - low.bits) / width
        # d ln D / dR = -ln 2 / (β D), R in bits
        rises = [-math.log(2) * width / (p.slope * p.mse) for p in (low, high)]
        ends = [math.log(p.mse) for p in (low, high)]
        return math.exp(
            (1 + 2 * t) * (1 - t) ** 2 * ends[0]
            + t * (1 - t) ** 2 * rises[0]
            + t * t * (3 - 2 * t) * ends[1]
            + t * t * (t - 1) * rises[1]
        )


def distortion_rate(source: Source, most_bits: float = 4.5) -> DistortionRate:
    """The bound of a source, solved at some twenty slopes up to `most_bits`, or to Shannon's lower bound."""
    steepest = 2 * source.variance  # 1/β of Gauss at no bits; heavy tails begin steeper
    if isinstance(source, Gauss):
        ends = [RatePoint(bits, 4.0**-bits, 4.0**bits / steepest) for bits in (0.0, most_bits)]
        return DistortionRate(tuple(ends), source.entropy)
    points: list[RatePoint] = []
    slope = 0.05 / steepest
    while True:
        point = solve(source, slope)
        if not points or point.bits > points[-1].bits + 1e-3:
            points.append(point)
        elif point.bits < 1e-3:
            points = [RatePoint(0.0, source.variance, slope)]
        least = 0.0 if source.entropy is None else shannon_lower_bound(source.entropy, point.bits)
        if point.bits >= most_bits or point.mse <= least * (1 + _TIGHT):
            return DistortionRate(tuple(points), source.entropy)
        # The curve is straight at high rates, and bends where the first atoms split.
        slope *= 2 ** (0.2 if point.bits < 0.25 else 0.5 if point.bits < 1 else 1)


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
    x = nodes.x
    centre = 0.0 if symmetric else float(nodes.p @ x)  # where the last atom stays, as the rate goes to zero
    grid = centre + distance * np.arange(
        math.floor((low - centre) / distance), math.ceil((high - centre) / distance) + 1
    )
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
