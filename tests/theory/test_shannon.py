"""Shannon's bound against closed forms, published values and the plain iteration of Blahut and Arimoto."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Generator

from bitbook.errors import PlanError, WeightError
from bitbook.theory.shannon import DistortionRate, distortion_rate, mixture, shannon_lower_bound, solve
from bitbook.theory.sources import Gauss, Laplace, Measured, Nodes, Source, StudentT

SOURCES = (Gauss(), Laplace(), StudentT(5))


@pytest.fixture(scope="module")
def laplace() -> DistortionRate:
    return distortion_rate(Laplace())


@pytest.mark.parametrize("slope", [0.51, 0.6, 1.0, 8.0, 128.0])
def test_gauss_is_solved_to_its_closed_form(slope: float) -> None:
    point = solve(Gauss(), slope)
    assert point.mse == pytest.approx(1 / (2 * slope), rel=3e-5)
    assert point.mse == pytest.approx(4**-point.bits, rel=1e-5)


def test_published_values_of_laplace(laplace: DistortionRate) -> None:
    found = [laplace(bits) for bits in (1, 2, 3)]
    assert found == pytest.approx([0.217, 0.0541, 0.0135], rel=3e-3)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_never_below_the_shannon_lower_bound_and_falling(source: Source) -> None:
    curve = distortion_rate(source, 3.0)
    rates = np.linspace(0, 5, 81).tolist()
    found = [curve(rate) for rate in rates]
    assert source.entropy is not None
    for rate, mse in zip(rates, found, strict=True):
        assert mse >= shannon_lower_bound(source.entropy, rate)
        assert mse <= 4**-rate * (1 + 1e-4), "Gauss is the hardest source of a variance"
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[0] == pytest.approx(source.variance)


@pytest.mark.parametrize("slope", [0.7, 2.2, 6.0])
def test_between_solved_points_the_curve_is_what_solving_gives(laplace: DistortionRate, slope: float) -> None:
    point = solve(Laplace(), slope)
    assert laplace(point.bits) == pytest.approx(point.mse, rel=3e-4)


def test_mixture_is_where_the_plain_iteration_goes() -> None:
    x = np.array([-2.0, -0.5, 0.1, 1.0, 3.0])
    p = np.array([0.1, 0.3, 0.3, 0.2, 0.1])
    y = np.linspace(-2, 3, 9)
    kernel = np.exp(-0.8 * np.square(x[:, None] - y))
    plain = np.full(len(y), 1 / len(y))
    for _ in range(200_000):
        plain = plain * (kernel.T @ (p / (kernel @ plain)))

    def length(q: np.ndarray) -> float:
        return float(-(p @ np.log(kernel @ q)))

    found = mixture(kernel, p)
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    assert length(found) == pytest.approx(length(plain), abs=2e-6)


def test_a_fair_coin_has_its_own_rate() -> None:
    """±1 at no error costs one bit; at every error less (the bound of a discrete source is finite)."""
    coin = Measured("coin", torch.tensor([1.0, -1.0]).repeat(5000))
    curve = distortion_rate(coin, 0.9)
    assert curve(0.0) == pytest.approx(1, rel=1e-3)
    point = solve(coin, 20.0)
    assert point.bits == pytest.approx(1, abs=1e-3) and point.mse < 1e-3


def test_a_measured_tensor_is_near_the_source_that_it_came_from(laplace: DistortionRate) -> None:
    w = Laplace().sample(100_000, Generator().manual_seed(0))
    curve = distortion_rate(Measured("w", w), 2.5)
    variance = float(w.var())
    for bits in (0.5, 1.0, 2.0):
        assert curve(bits) / variance == pytest.approx(laplace(bits), rel=0.03)
    scaled = distortion_rate(Measured("w", 0.01 * w), 1.5)
    assert scaled(1.0) == pytest.approx(1e-4 * curve(1.0), rel=2e-3)


@pytest.mark.parametrize("source", [Gauss(), Laplace(), StudentT(5), StudentT(3)], ids=lambda s: s.name)
def test_sources_have_unit_variance_and_their_entropy(source: Gauss | Laplace | StudentT) -> None:
    nodes: Nodes = source.nodes(0.2)
    assert nodes.p.sum() == pytest.approx(1)
    assert float(nodes.p @ nodes.x**2) == pytest.approx(1, abs=2e-3)
    density = source.density(nodes.x) * 1.0
    assert float(-(nodes.p @ np.log2(density))) == pytest.approx(source.entropy, abs=2e-3)
    sample = source.sample(200_000, Generator().manual_seed(1))
    if source != StudentT(3):  # whose sample variance does not settle
        assert float(sample.var()) == pytest.approx(1, rel=0.05)
    inside = float((sample.abs() < 1).float().mean())
    assert inside == pytest.approx(float(nodes.p[nodes.x < 1].sum()), abs=0.06)
    assert torch.equal(sample, source.sample(200_000, Generator().manual_seed(1)))


def test_mistakes() -> None:
    with pytest.raises(PlanError, match="whole number from 3"):
        StudentT(2)
    with pytest.raises(PlanError, match="zero bits or more"):
        distortion_rate(Gauss())(-1)
    with pytest.raises(WeightError, match="only finite"):
        Measured("w", torch.tensor([math.nan]))
