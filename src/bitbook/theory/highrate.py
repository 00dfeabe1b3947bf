"""High-rate theory: what a quantizer of many levels reaches, and the three advantages of vectors over scalars.

At R bits a sample, the best quantizer of vectors of k samples with density f has, per sample (Zador 1982; Gersho 1979),

    fixed rate      D = G_k · ‖f‖_{k/(k+2)} · 2^(-2R)             ‖f‖_a = (∫ f^a)^(1/a), of k-dimensional f per sample
    entropy-coded   D = G_k · 2^(2h) · 2^(-2R)                    h: differential entropy per sample, in bits

where G_k is the normalised second moment of the best cell.  Lookabaugh & Gray (1989) divide the ratio of a scalar's D
to a vector's into space filling `G_1 / G_k`, shape `‖f‖_{1/3} / ‖f*‖_{k/(k+2)}` and memory `‖f*‖ / ‖f‖`, f* being the
density of k independent samples.  Entropy coding gives scalars all of shape, and, with contexts, of memory.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

SECOND_MOMENT = {
    "Z": (1, 1 / 12),
    "A2": (2, 5 / (36 * math.sqrt(3))),
    "D4": (4, 0.076603),
    "E8": (8, 929 / 12960),
    "Leech": (24, 0.065771),
}
"""Dimension and normalised second moment of lattices (Conway & Sloane 1999, table 2.3)."""

SPHERE = 1 / (2 * math.pi * math.e)
"""Limit of the second moment in many dimensions: a ball's."""


class Density(Protocol):
    """A symmetric source with a density, as in `sources.py`."""

    def density(self, x: np.ndarray) -> np.ndarray: ...


def decibels(ratio: float) -> float:
    """`10 log10 ratio`; 6.02 dB are one bit."""
    return 10 * math.log10(ratio)


def ball_second_moment(k: int) -> float:
    """That of a ball in k dimensions: no cell is below it (Zador's lower bound, without its correction)."""
    log_volume = k / 2 * math.log(math.pi) - math.lgamma(k / 2 + 1)
    return math.exp(-2 / k * log_volume) / (k + 2)


def space_filling(k: int) -> float:
    """Decibels that the best known lattice cell of at most k dimensions gains over an interval; at most 1.53."""
    return max(decibels(SECOND_MOMENT["Z"][1] / moment) for size, moment in SECOND_MOMENT.values() if size <= k)


def most_space_filling(k: int) -> float:
    """Decibels that no cell of k dimensions exceeds."""
    return decibels(SECOND_MOMENT["Z"][1] / ball_second_moment(k))


def norm(source: Density, exponent: float) -> float:
    """`(∫ f^a dx)^(1/a)`, a in (0, 1], of a symmetric source of unit variance; in squared units at a = 1/3."""
    edges = np.concatenate([np.linspace(0, 8, 257)[:-1], np.geomspace(8, 1e7, 400)])
    t, w = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    values = source.density(edges[:-1, None] + half * (1 + t))
    return float(2 * (half * w * values**exponent).sum()) ** (1 / exponent)


def panter_dite(source: Density, bits: float) -> float:
    """Mean squared error of the best fixed-rate scalar quantizer at high rate (Panter & Dite 1951)."""
    return SECOND_MOMENT["Z"][1] * norm(source, 1 / 3) * 2 ** (-2 * bits)


def shape_advantage(source: Density, k: float = math.inf, *, entropy: float) -> float:
    """Decibels that vectors of k independent samples gain by where their codewords lie; `entropy` in bits, for k = ∞.

    At most 2.81 for Gauss and 5.63 for Laplace (Lookabaugh & Gray 1989, table I).
    """
    scalar = norm(source, 1 / 3)
    # For k independent samples, ‖f*‖_{k/(k+2)} is ‖f‖^k, and its k-th root per sample: (∫ f^a)^(k+2), a = k/(k+2).
    vector = 2 ** (2 * entropy) if math.isinf(k) else norm(source, k / (k + 2)) ** k
    return decibels(scalar / vector)


def ecsq(entropy: float, bits: float) -> float:
    """Mean squared error of an entropy-coded scalar quantizer at high rate (Gish & Pierce 1968)."""
    return SECOND_MOMENT["Z"][1] * 2 ** (2 * (entropy - bits))
