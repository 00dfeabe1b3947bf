from __future__ import annotations

import numpy as np
import pytest

from bitbook.errors import PlanError
from bitbook.scalar.lloyd_max import GAUSS, LAPLACE, Density, lloyd_max
from bitbook.vector.line import optimal_centroids


@pytest.mark.parametrize(
    ("density", "size", "error"),
    [
        (GAUSS, 1, 1.0),
        (GAUSS, 2, 0.3634),
        (GAUSS, 4, 0.1175),
        (GAUSS, 8, 0.03454),
        (GAUSS, 16, 0.009497),
        (LAPLACE, 2, 0.5),
        (LAPLACE, 4, 0.1762),
        (LAPLACE, 8, 0.0545),
    ],
)
def test_published_errors(density: Density, size: int, error: float) -> None:
    """Max 1960, table I; Paez & Glisson 1972; Jayant & Noll 1984."""
    found = lloyd_max(density, size)
    assert found.error == pytest.approx(error, rel=0.002)
    assert np.allclose(found.levels, -np.array(found.levels)[::-1], atol=1e-9)


def test_by_hand() -> None:
    assert lloyd_max(GAUSS, 2).levels == pytest.approx([-np.sqrt(2 / np.pi), np.sqrt(2 / np.pi)])
    assert lloyd_max(LAPLACE, 2).levels == pytest.approx([-np.sqrt(0.5), np.sqrt(0.5)])


@pytest.mark.parametrize("density", [GAUSS, LAPLACE])
def test_k_means_of_a_fine_grid_agrees(density: Density) -> None:
    edges = np.linspace(-12, 12, 6001)
    mass = np.diff([density.mass(x) for x in edges]).astype(np.float32)
    points = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
    assert np.allclose(optimal_centroids(points, 8, mass), lloyd_max(density, 8).levels, atol=2e-3)


@pytest.mark.parametrize("size", [0, 257, 2.0, True])
def test_refusals(size: int) -> None:
    with pytest.raises(PlanError, match="1 to 256"):
        lloyd_max(GAUSS, size)
