"""Lloyd–Max: the scalar quantizer with the least mean squared error for a density.

For samples it is the optimal k-means of `vector/line.py`, which `Codebook(k, (1, 1))` uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from bitbook.errors import PlanError

_CONVERGED = 1e-13
_MOST_ROUNDS = 100_000


class Density(NamedTuple):
    """A density of mean zero and variance one, by its integrals up to a point; log-concave, so that one optimum is."""

    mass: Callable[[float], float]
    """`x → ∫ f(t) dt` over t ≤ x."""
    moment: Callable[[float], float]
    """`x → ∫ t f(t) dt` over t ≤ x."""


class LloydMax(NamedTuple):
    """Levels, ascending, and their mean squared error."""

    levels: tuple[float, ...]
    error: float


GAUSS = Density(
    lambda x: math.erfc(-x / math.sqrt(2)) / 2,
    lambda x: -math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
)
LAPLACE = Density(
    lambda x: math.exp(math.sqrt(2) * x) / 2 if x < 0 else 1 - math.exp(-math.sqrt(2) * x) / 2,
    lambda x: -(abs(x) + math.sqrt(0.5)) * math.exp(-math.sqrt(2) * abs(x)) / 2,
)


def lloyd_max(density: Density, size: int) -> LloydMax:
    """The best `size` levels (Max 1960; Lloyd 1982): each the mean of its cell, cells ending midway between levels.

    Levels are symmetric where the density is.  Raises `PlanError` for a size outside 1 to 256.
    """
    if type(size) is not int or not 1 <= size <= 256:
        raise PlanError(f"lloyd_max(size={size!r}): use a whole number of levels from 1 to 256")
    levels = [6 * (i + 0.5) / size - 3 for i in range(size)]
    masses = [0.0]
    for _ in range(_MOST_ROUNDS):
        ends = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        mass = [0.0, *map(density.mass, ends), 1.0]
        moment = [0.0, *map(density.moment, ends), 0.0]
        masses = [b - a for a, b in itertools.pairwise(mass)]
        moved = [(b - a) / m for a, b, m in zip(moment, moment[1:], masses, strict=False)]
        settled = max(abs(a - b) for a, b in zip(levels, moved, strict=True)) < _CONVERGED
        levels = moved
        if settled:
            break
    return LloydMax(tuple(levels), 1 - sum(m * level**2 for m, level in zip(masses, levels, strict=True)))
