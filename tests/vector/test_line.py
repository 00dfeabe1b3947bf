"""Optimal k-means of scalars against all partitions, and against dynamic programming in its plainest form."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbook import Codebook, quantize
from bitbook.vector import line
from bitbook.vector.kmeans import kmeans
from bitbook.vector.line import optimal_centroids

f32 = np.float32
VALUES = st.one_of(st.integers(-4, 4).map(float), st.floats(-1e3, 1e3, width=32), st.sampled_from([1e-20, 1e6, -1e8]))


def cost(values: np.ndarray, centroids: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The weighted sum of squared distances to the nearest centroid, in float64."""
    square = ((values.astype(np.float64)[:, None] - centroids.astype(np.float64)) ** 2).min(1)
    return float((square if weights is None else square * weights).sum())


def least(values: list[float], weights: list[int], k: int) -> Fraction:
    """The least cost of all partitions of the sorted values into k intervals, in exact arithmetic."""
    pairs = sorted((Fraction(v), w) for v, w in zip(values, weights, strict=True) if w)
    best = None
    for cuts in itertools.combinations(range(1, len(pairs)), min(k, len(pairs)) - 1):
        total = Fraction(0)
        for part in (pairs[a:b] for a, b in itertools.pairwise((0, *cuts, len(pairs)))):
            mean = sum(v * w for v, w in part) / sum(w for _, w in part)
            total += sum(w * (v - mean) ** 2 for v, w in part)
        best = total if best is None or total < best else best
    assert best is not None
    return best


def slow(values: np.ndarray, k: int, weights: np.ndarray) -> float:
    """The recurrence without any short cut, O(k n²)."""
    order = np.argsort(values)
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    sums = [np.concatenate([[0], np.cumsum(term)]) for term in (w, w * x, w * x * x)]
    m, s, t = (row[None, :] - row[:, None] for row in sums)  # [i, j]: of i to j - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        costs = np.where(m > 0, t - s * s / m, np.where(m == 0, 0, np.inf))
    total = costs[0]
    for _ in range(k - 1):
        total = (total[:, None] + costs).min(0)
    return float(total[-1])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(VALUES, st.integers(0, 5)), min_size=1, max_size=9), st.integers(1, 5))
def test_no_partition_is_better(pairs: list[tuple[float, int]], k: int) -> None:
    values, weights = zip(*pairs, strict=True)
    if not any(weights):
        return
    x, w = np.array(values, f32), np.array(weights, f32)
    found = optimal_centroids(x, k, w)
    assert found.dtype == f32 and (np.diff(found) > 0).all()
    assert len(found) == min(k, len(np.unique(x[w > 0])))
    exact = float(least(x.tolist(), list(weights), k))
    rounding = (2.0**-24 * np.abs(found.astype(np.float64)).max()) ** 2  # of centroids to float32
    assert cost(x, found, w) <= exact * (1 + 1e-6) + float(w.sum()) * rounding + 1e-60


@pytest.mark.parametrize("k", [2, 3, 8, 16])
@pytest.mark.parametrize("table_bytes", [line.TABLE_BYTES, 0])
def test_it_equals_the_plain_recurrence(k: int, table_bytes: int) -> None:
    rng = np.random.default_rng(k)
    for x in (rng.standard_normal(1500), rng.laplace(size=1500) ** 3, rng.integers(0, 40, 1500) / 8):
        x, w = x.astype(f32), rng.integers(1, 9, 1500).astype(f32)
        found = optimal_centroids(x, k, w, table_bytes=table_bytes)
        assert cost(x, found, w) == pytest.approx(slow(x, k, w), rel=1e-6)


@pytest.mark.parametrize("table_bytes", [0, 100_000])
def test_memory_changes_nothing(table_bytes: int) -> None:
    x = np.random.default_rng(0).standard_normal(20_000).astype(f32)
    for k in (2, 7, 64):
        assert np.array_equal(optimal_centroids(x, k), optimal_centroids(x, k, table_bytes=table_bytes))


def test_the_bound_excludes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (np.random.default_rng(0).laplace(size=20_000) ** 3).astype(f32)
    bounded = [optimal_centroids(x, k) for k in (2, 5, 16)]
    monkeypatch.setattr(line, "COARSE", 1 << 30)
    for k, found in zip((2, 5, 16), bounded, strict=True):
        assert np.array_equal(found, optimal_centroids(x, k))


def test_plain_python_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(600).astype(f32), rng.random(600).astype(f32)
    fast = optimal_centroids(x, 6, w)
    monkeypatch.setattr(line, "_loops", lambda: (line._first, line._layer))
    assert np.array_equal(optimal_centroids(x, 6, w), fast)


def test_more_clusters_never_cost() -> None:
    x = np.random.default_rng(1).standard_normal(3000).astype(f32)
    costs = [cost(x, optimal_centroids(x, k)) for k in range(1, 40)]
    assert costs == sorted(costs, reverse=True)


def test_an_outlier_does_not_blur_the_rest() -> None:
    """Plain prefix sums would carry 10^16 through all later differences."""
    rng = np.random.default_rng(2)
    bulk = rng.standard_normal(500).astype(f32)
    with_outlier = np.concatenate([[f32(-1e8)], bulk])
    assert np.array_equal(optimal_centroids(with_outlier, 9)[1:], optimal_centroids(bulk, 8))


def test_order_and_weights_of_one_change_nothing() -> None:
    x = np.random.default_rng(3).standard_normal(1000).astype(f32)
    expected = optimal_centroids(x, 7)
    assert np.array_equal(optimal_centroids(x[::-1].copy(), 7), expected)
    assert np.array_equal(optimal_centroids(x, 7, np.ones(1000, f32)), expected)
    counts = np.random.default_rng(4).integers(0, 4, 1000)
    assert np.array_equal(optimal_centroids(x, 7, counts.astype(f32)), optimal_centroids(np.repeat(x, counts), 7))


def test_powers_of_two_scale_exactly() -> None:
    x = np.random.default_rng(5).standard_normal(1000).astype(f32)
    assert np.array_equal(optimal_centroids(x * f32(1024), 9), optimal_centroids(x, 9) * f32(1024))


def test_codebooks_of_scalars_are_optimal_whatever_the_seed() -> None:
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(20, 30, generator=torch.Generator().manual_seed(1))
    runs = [
        quantize(Codebook(8, (1, 1)), w, importance=importance, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ]
    assert torch.equal(runs[0].decode(), runs[1].decode())
    expected = optimal_centroids(w.numpy().reshape(-1), 8, importance.numpy().reshape(-1))
    assert np.array_equal(runs[0].side["centroids"].decode().numpy()[:, 0], expected)


def test_a_projection_starts_from_the_optimum() -> None:
    points = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))

    def project(centroids: torch.Tensor) -> torch.Tensor:
        return (centroids * 4).round() / 4

    found = kmeans(points, 6, project=project)
    rounded = project(torch.from_numpy(optimal_centroids(points[:, 0].numpy(), 6)))
    assert found.inertia <= cost(points[:, 0].numpy(), rounded.numpy())
