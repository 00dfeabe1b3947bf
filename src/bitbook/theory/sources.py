"""Memoryless sources of unit variance, and tensors read as one: what quantizers are compared on.

density ─► nodes, weights ─► shannon.py          sample ─► quantizers ─► bytes
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from bitbook.errors import PlanError
from bitbook.quantizer import checked

_SKIPPED = 1e-5  # probability of what lies beyond the core, where nodes stand farther apart than the noise
_GAUSS_LEGENDRE = 8  # nodes of a panel, which is two standard deviations of the noise wide


class Nodes(NamedTuple):
    """A source on a line of points: `x` (n,) ascending, probabilities `p` (n,) that add up to one."""

    x: np.ndarray
    p: np.ndarray
    core: tuple[float, float]
    """Between these two, points are dense against the noise; the few beyond stand alone."""


class Source(Protocol):
    """Independent draws from one distribution."""

    @property
    def name(self) -> str:
        """As tables call it."""
        ...

    @property
    def variance(self) -> float:
        """Mean squared error at no bits."""
        ...

    @property
    def entropy(self) -> float | None:
        """Differential entropy in bits; None where there is no density."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether x and −x are as likely; nodes are then those above zero, for both."""
        ...

    def nodes(self, noise: float) -> Nodes:
        """The source seen through noise of this standard deviation."""
        ...


@dataclass(frozen=True)
class Gauss:
    """The normal distribution of unit variance."""

    name = "Gauss"
    variance = 1.0
    symmetric = True

    @property
    def entropy(self) -> float:
        return math.log2(2 * math.pi * math.e) / 2

    def density(self, x: np.ndarray) -> np.ndarray:
        return np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)

    def sample(self, count: int, generator: Generator) -> Tensor:
        return torch.randn(count, generator=generator)

    def nodes(self, noise: float) -> Nodes:
        return _nodes(self, noise, core=4.5, reach=9.0)


@dataclass(frozen=True)
class Laplace:
    """The two-sided exponential distribution of unit variance."""

    name = "Laplace"
    variance = 1.0
    symmetric = True

    @property
    def entropy(self) -> float:
        return math.log2(math.sqrt(2) * math.e)

    def density(self, x: np.ndarray) -> np.ndarray:
        return np.exp(-math.sqrt(2) * np.abs(x)) / math.sqrt(2)

    def sample(self, count: int, generator: Generator) -> Tensor:
        u = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
        return (-torch.sign(u) * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()

    def nodes(self, noise: float) -> Nodes:
        return _nodes(self, noise, core=-math.log(_SKIPPED) / math.sqrt(2), reach=20.0)


@dataclass(frozen=True)
class StudentT:
    """Student's t of unit variance: tails fall like |x|^-(degrees + 1), which is what outliers look like."""

    degrees: int = 5
    variance = 1.0
    symmetric = True

    def __post_init__(self) -> None:
        if type(self.degrees) is not int or self.degrees < 3:
            raise PlanError(f"StudentT(degrees={self.degrees!r}): use a whole number from 3; below, no variance exists")

    @property
    def name(self) -> str:
        return f"Student-t {self.degrees}"

    @property
    def entropy(self) -> float:
        x, p = _panels(self, np.concatenate([np.linspace(0, 8, 33)[:-1], np.geomspace(8, 1e6, 60)]))
        return float(-(2 * p * np.log2(np.maximum(self.density(x), 1e-300))).sum())

    def density(self, x: np.ndarray) -> np.ndarray:
        v = self.degrees
        log_norm = math.lgamma((v + 1) / 2) - math.lgamma(v / 2) - math.log(math.pi * (v - 2)) / 2
        return np.exp(log_norm - (v + 1) / 2 * np.log1p(np.square(x) / (v - 2)))

    def sample(self, count: int, generator: Generator) -> Tensor:
        chi2 = torch.zeros(count, dtype=torch.float64)
        for _ in range(self.degrees):
            chi2 += torch.randn(count, generator=generator, dtype=torch.float64).square()
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        return (normal * ((self.degrees - 2) / chi2).sqrt()).float()

    def nodes(self, noise: float) -> Nodes:
        # For large x, P(|X| > x) falls like x^-degrees, and the variance beyond x like x^(2 - degrees).
        edges = np.geomspace(1, 1e8, 400)
        tail = np.array([self._beyond(edge) for edge in edges])
        core = float(edges[np.argmax(tail < _SKIPPED)])
        return _nodes(self, noise, core=core, reach=core * 1e7 ** (1 / (self.degrees - 2)))

    def _beyond(self, x: float) -> float:
        """A bound on P(|X| > x), from the density below its power law."""
        return float(2 * self.density(np.array(x)) * x / self.degrees * (1 + (self.degrees - 2) / x**2))


@dataclass(frozen=True, eq=False)
class Measured:
    """A tensor's values as if drawn independently: its histogram is all that remains of it.

    What a bound for this source says about the tensor is the bound for coders that see no neighbours.
    """

    name: str
    values: Tensor
    entropy = None
    symmetric = False

    def __post_init__(self) -> None:
        checked(self.values)

    @property
    def variance(self) -> float:
        return float(self.values.double().var(correction=0))

    def nodes(self, noise: float) -> Nodes:
        """Means and shares of bins a third of the noise wide, or less; values beyond the core stand for themselves."""
        x = np.sort(self.values.detach().double().reshape(-1).numpy())
        cut = int(_SKIPPED / 2 * len(x))
        low, high = float(x[cut]), float(x[len(x) - 1 - cut])
        inside = x[cut : len(x) - cut]
        width = min(noise / 3, math.sqrt(self.variance) / 20)
        bins = np.floor((inside - low) / width).astype(np.int64) if high > low else np.zeros(len(inside), np.int64)
        _, first, counts = np.unique(bins, return_index=True, return_counts=True)
        means = np.add.reduceat(inside, first) / counts
        tails = x[:cut], x[len(x) - cut :]
        points = np.concatenate([tails[0], means, tails[1]])
        weights = np.concatenate([np.ones(cut), counts, np.ones(cut)]) / len(x)
        return Nodes(points, weights, (low, high))


class _Density(Protocol):
    def density(self, x: np.ndarray) -> np.ndarray: ...


def _panels(source: _Density, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre points between edges, and the probability that each stands for."""
    t, w = np.polynomial.legendre.leggauss(_GAUSS_LEGENDRE)
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + t)
    return x.reshape(-1), (half * w * source.density(x)).reshape(-1)


def _nodes(source: _Density, noise: float, core: float, reach: float) -> Nodes:
    """Points above zero: panels of twice the noise within the core, then each wider than the one before."""
    count = max(math.ceil(core / (2 * noise)), 4)
    edges = list(np.linspace(0, core, count + 1))
    width = edges[-1] - edges[-2]
    while edges[-1] < reach:
        width *= 1.3
        edges.append(edges[-1] + width)
    x, p = _panels(source, np.array(edges))
    return Nodes(x, p / p.sum(), (0.0, core))
