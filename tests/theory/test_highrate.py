from __future__ import annotations

import math

import numpy as np
import pytest

from bitbook.theory.highrate import (
    SECOND_MOMENT,
    SPHERE,
    ball_second_moment,
    decibels,
    ecsq,
    most_space_filling,
    panter_dite,
    shape_advantage,
    space_filling,
)
from bitbook.theory.sources import Gauss, Laplace


def test_published_advantages() -> None:
    """Lookabaugh & Gray 1989, table I and section III."""
    for source, most in ((Gauss(), 2.81), (Laplace(), 5.63)):
        gains = [shape_advantage(source, k, entropy=source.entropy) for k in (1, 2, 4, 8, 64, math.inf)]
        assert gains[0] == pytest.approx(0, abs=1e-6) and gains == sorted(gains)
        assert gains[-1] == pytest.approx(most, abs=0.005)
    assert shape_advantage(Gauss(), 2, entropy=0) == pytest.approx(1.14, abs=0.01)


def test_second_moments_lie_between_an_interval_and_a_ball() -> None:
    assert decibels(SECOND_MOMENT["Z"][1] / SPHERE) == pytest.approx(1.533, abs=1e-3)
    assert SECOND_MOMENT["E8"][1] == pytest.approx(0.071682, abs=1e-6)
    for size, moment in SECOND_MOMENT.values():
        assert SPHERE < ball_second_moment(size) <= moment * (1 + 1e-12) <= 1 / 12 * (1 + 1e-12)
        assert space_filling(size) <= most_space_filling(size) + 1e-9
    assert space_filling(1) == 0 and space_filling(3) == space_filling(2) == pytest.approx(0.167, abs=1e-3)
    assert most_space_filling(10_000) == pytest.approx(1.53, abs=0.01)


def test_a_hexagon_has_its_second_moment() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (400_000, 2))
    x, y = np.abs(points).T
    inside = points[(x <= math.sqrt(3) / 2) & (x / math.sqrt(3) + y <= 1)]  # side 1
    area = 3 * math.sqrt(3) / 2
    assert np.square(inside).sum(1).mean() / 2 / area == pytest.approx(SECOND_MOMENT["A2"][1], rel=3e-3)


def test_high_rate_errors() -> None:
    assert panter_dite(Gauss(), 4) == pytest.approx(math.sqrt(3) * math.pi / 2 / 256)
    assert panter_dite(Laplace(), 4) == pytest.approx(4.5 / 256)
    assert ecsq(Gauss().entropy, 4) == pytest.approx(math.pi * math.e / 6 / 256)
