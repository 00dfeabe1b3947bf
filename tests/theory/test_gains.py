"""Gains of tensors whose gains are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from bitbook.errors import WeightError
from bitbook.theory.gains import Gains, explain, gaussian_memory, neighbour_memory
from bitbook.theory.sources import Laplace


def pairs(rho: float, rows: int = 150, cols: int = 80) -> Tensor:
    """Normal numbers of which each second one is correlated with the one before."""
    w = torch.randn(rows, cols, generator=Generator().manual_seed(0))
    w[:, 1::2] = rho * w[:, ::2] + math.sqrt(1 - rho**2) * w[:, 1::2]
    return w


@pytest.fixture(scope="module")
def independent() -> Gains:
    return explain("w", pairs(0.0))


def test_independent_normal_weights(independent: Gains) -> None:
    g = independent
    assert g.bits == 2 and g.dimension in (2, 4)
    assert abs(g.memory) < 0.15 and abs(g.memory_gauss) < 0.03 and abs(g.memory_neighbours) < 0.2
    assert g.scalar == pytest.approx(0.1175, rel=0.03)  # Max 1960
    assert g.ecsq == pytest.approx(0.0889, rel=0.03) and g.bound == pytest.approx(1 / 16, rel=0.02)
    assert g.entropy_coding == pytest.approx(1.21, abs=0.25) and g.above_bound == pytest.approx(1.53, abs=0.1)
    assert 0 < g.shape < 1.9 and g.space_filling > 0.1
    assert "say little about each other" in " ".join(g.advice())


@pytest.mark.parametrize("rho", [0.6, 0.9])
def test_correlated_pairs(rho: float) -> None:
    g = explain("w", pairs(rho))
    wanted = -10 * math.log10(1 - rho**2) / 2
    assert g.memory_gauss == pytest.approx(wanted, abs=0.1)
    assert g.memory_neighbours == pytest.approx(wanted, abs=0.3)
    assert g.memory == pytest.approx(wanted, abs=0.35)
    assert g.vectors == pytest.approx(g.memory + g.shape + g.space_filling)
    assert "depend on each other" in " ".join(g.advice())


def test_dependence_without_correlation_is_seen_by_neighbours_alone() -> None:
    generator = Generator().manual_seed(1)
    scale = torch.rand(20_000, 1, generator=generator).mul(3).exp()
    w = scale * torch.randn(20_000, 2, generator=generator)
    mixed = w.reshape(-1)[torch.randperm(w.numel(), generator=generator)].reshape(-1, 2)
    assert neighbour_memory(w, mixed, generator) > 0.25
    assert abs(gaussian_memory(w) - gaussian_memory(mixed)) < 0.1


def test_tails_are_what_entropy_coding_is_for(independent: Gains) -> None:
    w = Laplace().sample(12_000, Generator().manual_seed(0)).reshape(150, 80)
    g = explain("w", w)
    assert g.entropy_coding > 3 > independent.entropy_coding
    assert "Entropy-code scalars" in g.advice()[0]


def test_codebooks_count_their_bytes(independent: Gains) -> None:
    few, many = (explain("w", pairs(0.9, rows, 80)) for rows in (100, 800))
    for gains in (few, many):
        assert [book.precision for book in gains.precisions] == [4, 5, 6, 8]
        errors = [book.mse for book in gains.precisions]
        assert errors == sorted(errors, reverse=True)
        for book in gains.precisions[1:]:
            assert book.predicted == pytest.approx(book.mse, rel=0.12)
        size = 2**8 if gains.dimension == 4 else 2**4
        assert gains.precisions[-1].codewords <= size
    assert few.dimension < many.dimension  # fewer weights, shorter vectors
    assert many.sizes[-1].dimension == many.dimension and many.best_size.merit <= many.sizes[0].merit
    assert independent.vectors_net < independent.vectors


def test_scale_shape_and_place_do_not_matter() -> None:
    w = pairs(0.6, 100, 72)
    plain, moved = explain("w", w), explain("w", (3e-3 * w).reshape(100, 8, 3, 3))
    for field in ("scalar", "vector", "ecsq", "bound", "memory"):
        assert getattr(moved, field) == pytest.approx(getattr(plain, field), rel=0.02, abs=0.02)
    assert explain("w", w) == plain
    assert replace(plain, name="v") != plain
    json.dumps(plain.to_json(), allow_nan=False)
    assert explain("w", w[:, :71]).weights == 7100 and explain("w", w.reshape(-1)).dimension >= 2


def test_mistakes() -> None:
    with pytest.raises(WeightError, match="w has 10 weights"):
        explain("w", torch.ones(10))
    with pytest.raises(WeightError, match="all equal"):
        explain("w", torch.ones(100, 20))
