"""k-means: laws, a slow Lloyd in numpy, and bytes that depend on nothing but points, options and seed."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbook.errors import PlanError, WeightError
from bitbook.vector import kernels
from bitbook.vector import kmeans as module
from bitbook.vector.kmeans import Clustering, assign, kmeans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gauss(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=seeded(seed))


def distances(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> np.ndarray:
    """(n, k) weighted squared distances in float64, by the formula."""
    square = (points.double()[:, None] - centroids.double()) ** 2
    if weights is not None:
        square = square * (weights.double() if weights.ndim == 2 else weights.double()[:, None])[:, None]
    return square.sum(-1).numpy()


def reference(points: Tensor, start: Tensor, weights: Tensor | None, iterations: int) -> float:
    """Inertia after Lloyd's iteration in its plainest form; clusters must not run empty."""
    x, c = points.double().numpy(), start.double().numpy()
    w = np.ones_like(x) if weights is None else np.broadcast_to(weights.reshape(len(x), -1).double(), x.shape)
    for _ in range(iterations):
        labels = (w[:, None] * (x[:, None] - c) ** 2).sum(-1).argmin(1)
        c = np.stack([(w * x)[labels == j].sum(0) / w[labels == j].sum(0) for j in range(len(c))])
    return float((w[:, None] * (x[:, None] - c) ** 2).sum(-1).min(1).sum())


def lloyd(points: Tensor, start: Tensor, weights: Tensor | None = None, iterations: int = 10) -> Clustering:
    return module._lloyd(module._Data.of(points, weights, 1 << 20), start.numpy(), iterations, 0.0)


def same(a: Clustering, b: Clustering) -> bool:
    return (
        a.centroids.numpy().tobytes() == b.centroids.numpy().tobytes()
        and torch.equal(a.labels, b.labels)
        and (a.inertia, a.iterations) == (b.inertia, b.iterations)
    )


def weightings(n: int, d: int) -> list[Tensor | None]:
    return [None, torch.rand(n, generator=seeded(1)) + 0.1, torch.rand(n, d, generator=seeded(2)) + 0.1]


@pytest.mark.parametrize(("n", "d", "k"), [(300, 1, 7), (500, 2, 16), (400, 5, 9), (200, 33, 6)])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_lloyd_equals_the_slow_reference(n: int, d: int, k: int, kind: int) -> None:
    points, weights = gauss(n, d), weightings(n, d)[kind]
    ours = lloyd(points, points[:k], weights)
    assert ours.inertia == pytest.approx(reference(points, points[:k], weights, 10), rel=1e-5)
    costs = distances(points, ours.centroids, weights)
    assert ours.inertia == pytest.approx(costs.min(1).sum(), rel=1e-12)
    assert np.array_equal(ours.labels.numpy(), costs.argmin(1))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_without_numba_the_labels_are_the_same(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = gauss(500, 6), weightings(500, 6)[kind]
    fast = kmeans(points, 12, weights=weights, restarts=2, generator=seeded())
    nearest = kernels._nearest_numpy
    plain = kernels.Kernels((nearest, nearest), kernels._sums_numpy, kernels._closer_numpy)
    monkeypatch.setattr(module, "kernels", lambda: plain)
    slow = kmeans(points, 12, weights=weights, restarts=2, generator=seeded(), chunk_bytes=4000)
    assert torch.equal(fast.labels, slow.labels)
    assert torch.equal(fast.centroids, slow.centroids)
    assert fast.inertia == pytest.approx(slow.inertia, rel=1e-12)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=24), d=st.integers(1, 5), k=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1000.0, 2.0**20]), kind=st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lowest_index(values: list[int], d: int, k: int, offset: float, kind: int) -> None:
    points = torch.tensor([[(v * (j + 2)) % 4 for j in range(d)] for v in values]).float() + offset
    centroids = points[torch.arange(k) * 7 % len(points)] + 0.5 * (torch.arange(k)[:, None] % 3)
    weights = torch.ones(len(points), d) if kind else None
    expected = distances(points, centroids).argmin(1)
    assert np.array_equal(assign(points, centroids, weights=weights).numpy(), expected)


@given(
    rows=st.lists(st.tuples(*[st.sampled_from([-2.0, 0.0, 0.5, 1e-30, 1e30])] * 2), min_size=1, max_size=12),
    k=st.integers(1, 14), seed=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_ugly_points(rows: list[tuple[float, float]], k: int, seed: int) -> None:
    points = torch.tensor(rows)
    found = kmeans(points, k, restarts=2, generator=seeded(seed))
    distinct = points.unique(dim=0)
    assert found.centroids.shape == (k, 2)
    assert np.isfinite(found.inertia)
    assert torch.equal(found.labels, assign(points, found.centroids))
    if k >= len(distinct):
        assert found.inertia == 0
        assert torch.equal(found.centroids.unique(dim=0), distinct)
        assert (found.centroids[len(distinct) :] == found.centroids[len(distinct) - 1]).all()
    else:
        assert len(found.labels.unique()) == k


@given(n=st.integers(4, 60), d=st.integers(1, 6), k=st.integers(1, 10), kind=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_no_cluster_is_empty(n: int, d: int, k: int, kind: int) -> None:
    points = gauss(n, d, seed=n)
    bad = torch.full((k, d), 50.0)  # every cluster but one starts empty
    found = lloyd(points, bad, weightings(n, d)[kind], iterations=k % 3)
    assert len(found.labels.unique()) == min(n, k)
    if k >= n:
        assert found.inertia == 0


def test_weights_of_one_change_nothing() -> None:
    points = gauss(300, 4)
    plain = kmeans(points, 10, generator=seeded())
    for ones in (torch.ones(300), torch.ones(300, 4)):
        assert same(plain, kmeans(points, 10, weights=ones, generator=seeded()))


def test_integer_weights_repeat_points() -> None:
    points, counts = gauss(200, 3), torch.randint(1, 5, (200,), generator=seeded(3))
    weighted = lloyd(points, points[:8], counts.float())
    repeated = lloyd(points.repeat_interleave(counts, 0), points[:8])
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-6)
    assert torch.allclose(weighted.centroids, repeated.centroids, atol=1e-6)


def test_points_without_weight_get_labels_but_no_influence() -> None:
    points, weights = gauss(100, 2), torch.ones(100)
    points[::3], weights[::3] = points[::3] * 100, 0
    found = kmeans(points, 5, weights=weights, generator=seeded())
    kept = weights > 0
    alone = kmeans(points[kept], 5, generator=seeded())
    assert torch.equal(found.centroids, alone.centroids)
    assert torch.equal(found.labels, assign(points, found.centroids))


def test_scaling_weights_scales_inertia() -> None:
    points, weights = gauss(200, 4), torch.rand(200, 4, generator=seeded(5))
    one, tiny = (kmeans(points, 8, weights=weights * s, generator=seeded()) for s in (1.0, 2.0**-40))
    assert torch.equal(one.labels, tiny.labels)
    assert tiny.inertia == one.inertia * 2.0**-40


def test_order_of_points_does_not_matter() -> None:
    points, order = gauss(400, 3), torch.randperm(400, generator=seeded())
    here, there = lloyd(points, points[:9]), lloyd(points[order], points[:9])
    assert here.inertia == pytest.approx(there.inertia, rel=1e-6)
    assert torch.equal(here.labels[order], there.labels)


def test_projection_is_inside_the_loop() -> None:
    points = gauss(600, 2)

    def project(centroids: Tensor) -> Tensor:
        return (centroids * 2).round() / 2

    found = kmeans(points, 12, project=project, restarts=3, generator=seeded())
    codewords = project(found.centroids)
    costs = distances(points, codewords)
    assert np.array_equal(found.labels.numpy(), costs.argmin(1))
    assert found.inertia == pytest.approx(costs.min(1).sum(), rel=1e-12)
    afterwards = kmeans(points, 12, restarts=3, generator=seeded())
    assert found.inertia <= distances(points, project(afterwards.centroids)).min(1).sum()
    few = kmeans(points, 12, project=torch.sign, generator=seeded())  # at most 4 distinct codewords: must end
    assert few.centroids.shape == (12, 2)


def test_more_restarts_never_cost_and_more_iterations_never_cost() -> None:
    points = gauss(500, 4)
    by_iterations = [kmeans(points, 20, iterations=i, tolerance=0, generator=seeded()) for i in (0, 1, 5, 100)]
    assert [run.inertia for run in by_iterations] == sorted((r.inertia for r in by_iterations), reverse=True)
    assert by_iterations[0].iterations == 0
    start = [points[10 * i : 10 * i + 20] for i in range(3)]
    assert by_iterations[3].inertia <= 1.1 * min(lloyd(points, s, iterations=100).inertia for s in start)


@pytest.mark.parametrize("kind", [0, 2])
def test_chunks_and_threads_change_no_bit(kind: int) -> None:
    points = gauss(9001, 4)
    weights = weightings(9001, 4)[kind]
    before, runs = torch.get_num_threads(), []
    try:
        for threads, chunk_bytes in ((1, 1), (1, 1 << 30), (2, 32 << 20), (3, 32 << 20)):
            torch.set_num_threads(threads)
            runs.append(kmeans(points, 130, weights=weights, iterations=4, chunk_bytes=chunk_bytes, generator=seeded()))
    finally:
        torch.set_num_threads(before)
    assert all(same(runs[0], run) for run in runs[1:])
    small = [kmeans(points[:200], 9, restarts=3, chunk_bytes=c, generator=seeded()) for c in (1, 1 << 25)]
    assert same(*small)


def digest() -> str:
    generator = seeded(7)
    found = kmeans(torch.randn(500, 3, generator=generator), 17, restarts=2, generator=generator)
    return hashlib.sha256(found.centroids.numpy().tobytes() + found.labels.numpy().tobytes()).hexdigest()


def test_another_process_gives_the_same_bytes() -> None:
    code = (
        "import hashlib, torch; from bitbook.vector.kmeans import kmeans\n"
        "seeded = lambda seed: torch.Generator().manual_seed(seed)\n" + inspect.getsource(digest)
    )
    path = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code + "print(digest())"]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout
    assert there.strip() == digest()


def test_seeding_from_a_sample_meets_far_points() -> None:
    points = gauss(6000, 2)
    points[17], points[4321] = torch.tensor([1e4, 0.0]), torch.tensor([0.0, -1e4])
    found = kmeans(points, 8, generator=seeded())
    assert (found.labels == found.labels[17]).sum() == 1
    assert (found.labels == found.labels[4321]).sum() == 1


def test_seeding_falls_back_when_the_sample_has_too_few_distinct_points() -> None:
    points = torch.zeros(6000, 2)
    points[:40, 0] = torch.arange(40) * 1e-3
    points[40, 0] = 1e3  # draws half of the sample
    assert len(kmeans(points, 41, generator=seeded()).labels.unique()) == 41


def test_inertia_is_not_worse_than_scikit_learns() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points = pytest.importorskip("sklearn.datasets").load_digits().data[:600].astype(np.float32)
    seeds = range(3)
    ours = [kmeans(torch.from_numpy(points), 20, restarts=3, generator=seeded(s)).inertia for s in seeds]
    theirs = [cluster.KMeans(20, n_init=3, random_state=s).fit(points).inertia_ for s in seeds]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)


def test_inputs_are_left_alone() -> None:
    points = gauss(50, 3).requires_grad_()
    weights = torch.rand(50, 3)
    copies = points.detach().clone(), weights.clone()
    kmeans(points, 5, weights=weights, generator=seeded())
    assert torch.equal(points, copies[0])
    assert torch.equal(weights, copies[1])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": 0}, PlanError, "k must be at least 1, but is 0"),
        ({"restarts": 0}, PlanError, "restarts"),
        ({"iterations": -1}, PlanError, "iterations"),
        ({"tolerance": float("nan")}, PlanError, "tolerance"),
        ({"chunk_bytes": 0}, PlanError, "chunk_bytes"),
        ({"points": torch.zeros(0, 2)}, PlanError, r"\(0, 2\)"),
        ({"points": torch.zeros(4)}, PlanError, r"\(4,\)"),
        ({"points": torch.tensor([[1.0, float("nan")]])}, WeightError, "1 of 2 values"),
        ({"points": torch.tensor([[1.0, float("inf")]])}, WeightError, "finite"),
        ({"weights": torch.ones(3)}, PlanError, r"\(4,\) or \(4, 2\)"),
        ({"weights": -torch.ones(4)}, WeightError, "negative"),
        ({"weights": torch.full((4,), float("nan"))}, WeightError, "weights must be finite"),
        ({"weights": torch.zeros(4)}, WeightError, "all points are zero"),
        ({"project": lambda c: c[:1]}, PlanError, "project must keep shape"),
        ({"project": lambda c: c / 0}, WeightError, "projected centroids must be finite"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], match: str) -> None:
    arguments = {"points": torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 4.0], [5.0, 1.0]]), "k": 2} | change
    with pytest.raises(error, match=match):
        kmeans(**arguments)


def test_assign_checks_centroids() -> None:
    with pytest.raises(PlanError, match=r"centroids must be \(k, 2\)"):
        assign(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(WeightError, match="centroids must be finite"):
        assign(torch.zeros(3, 2), torch.full((1, 2), float("nan")))
