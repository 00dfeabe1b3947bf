"""Weighted k-means: greedy k-means++ seeding, Lloyd's iteration, a projection inside the loop.

    points ─► _Data ─► _seeds ─► [ project ─► _Search ─► repair ─► means ] until nothing moves ─► Clustering
                   └─ of one coordinate: the optimum (`line.py`) ─► the same loop, if there is a projection

Labels are exact: float64 decides by the formula `sum_j w_ij (x_ij - c_j)^2` itself, and equal distances go
to the lowest index. Points, weights and centroids are float32 values, sums are float64 in the order of the
points, so neither threads nor memory limits change a bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitbook.errors import PlanError, WeightError
from bitbook.vector.kernels import kernels
from bitbook.vector.line import optimal_centroids

Project = Callable[[Tensor], Tensor]

CHUNK_BYTES = 32 << 20
SEEDING_POINTS = 32  # per centroid; more points than that are sampled for seeding


@dataclass(frozen=True)
class Clustering:
    """What `kmeans` found: `project(centroids)[labels]` approximates the points."""

    centroids: Float[Tensor, "k d"]  # float32; raw means, before any projection
    labels: Int[Tensor, " n"]  # nearest (projected) centroid, ties to the lowest index
    inertia: float  # weighted sum of squared distances to the (projected) centroids
    iterations: int  # updates of the centroids in the winning restart, its loop with `project` if there is one


def kmeans(
    points: Float[Tensor, "n d"],
    k: int,
    *,
    weights: Float[Tensor, " n"] | Float[Tensor, "n d"] | None = None,
    restarts: int = 1,
    iterations: int = 100,
    tolerance: float = 1e-4,
    project: Project | None = None,
    generator: torch.Generator | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Clustering:
    """Cluster `points` around `k` centroids: the least `sum_ij w_ij (x_ij - c_j)^2` of several restarts.

    `weights` are non-negative, one per point or one per coordinate (then each coordinate of a mean has its
    own). `project` maps (k, d) to (k, d), float32 on the CPU, and is applied *inside* the loop: points are
    assigned to `project(means)`, that distance counts, and the best iterate is kept, since rounding need not
    improve at every step; this loop starts where one without `project` ended. A loop ends after `iterations`
    updates, when no label changes, or when the squared shift of the centroids falls to `tolerance` times the
    mean variance of a coordinate (the rule of scikit-learn). With fewer than `k` distinct points each is
    returned once and the last is repeated; otherwise, without `project`, no cluster is empty.

    Points of one coordinate are clustered optimally, without seeds, restarts or iterations; with `project`, the loop
    starts from there.

    Seeding: greedy k-means++ (Arthur & Vassilvitskii 2007) with 2 + ln k candidates; of more than 32 k points
    (and 4,096) a sample, the lightweight coreset of Bachem et al. 2018. Tables stay below `chunk_bytes`.
    `generator=None` draws from torch's default generator.

    Raises:
        PlanError: k, restarts, iterations, tolerance, chunk_bytes or a shape cannot be used.
        WeightError: points or weights are not finite, or weights are negative or all zero.
    """
    for name, value, least in (("k", k, 1), ("restarts", restarts, 1), ("iterations", iterations, 0)):
        if value < least:
            raise PlanError(f"{name} must be at least {least}, but is {value}")
    if not tolerance >= 0:
        raise PlanError(f"tolerance must be zero or positive, but is {tolerance}")
    data = _Data.of(points, weights, chunk_bytes)
    used = data.mass * data.weights.max(1) > 0
    if not used.any():
        raise WeightError("the weights of all points are zero; give at least one positive weight, or None")
    kept = data if used.all() else data.take(used)
    limit = tolerance * kept.variance() if tolerance else 0.0
    if kept.d == 1:
        runs = [_lloyd(kept, _optimum(kept, k), 0, limit)]
    else:
        starts = [kept.points[picks, : kept.d] for picks in _seeds(kept, k, restarts, generator)]
        runs = [_lloyd(kept, start, iterations, limit) for start in starts]
    if project is not None:
        # Rounding freezes codewords too early for a start far from a minimum.
        runs = [_lloyd(kept, run.centroids.numpy(), iterations, limit, project) for run in runs]
    best = min(runs, key=lambda run: run.inertia)
    labels = best.labels
    if kept is not data:
        labels = torch.from_numpy(_Search(data)(_codewords(data, best.centroids.numpy(), project))[0])
    device = points.device
    return Clustering(best.centroids.to(device), labels.to(device), best.inertia, best.iterations)


def assign(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    weights: Float[Tensor, " n"] | Float[Tensor, "n d"] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Int[Tensor, " n"]:
    """Index of the centroid nearest to each point, by `sum_j w_ij (x_ij - c_j)^2`; ties to the lowest index.

    One weight per point changes nothing, one per coordinate does. Raises as `kmeans`.
    """
    data = _Data.of(points, weights, chunk_bytes)
    codewords = _codewords(data, centroids.detach().cpu().float().numpy(), None)
    return torch.from_numpy(_Search(data)(codewords)[0]).to(points.device)


@dataclass(frozen=True)
class _Data:
    """Checked points and weights as arrays; `width` is `d` filled up with zeros to a multiple of four."""

    points: np.ndarray  # (n, width) float32
    metric: np.ndarray  # (n, width) float32 weights of coordinates; (0, width) where all are one
    mass: np.ndarray  # (n,) float64 weights of points
    scale: float  # `metric` is `scale` x the caller's weights
    d: int
    chunk_bytes: int

    @staticmethod
    def of(points: Tensor, weights: Tensor | None, chunk_bytes: int) -> _Data:
        if points.ndim != 2 or 0 in points.shape:
            raise PlanError(f"points must be (n, d), neither of them 0, but have shape {tuple(points.shape)}")
        if chunk_bytes < 1:
            raise PlanError(f"chunk_bytes must be positive, but is {chunk_bytes}")
        n, d = points.shape
        x = _float32(points, "points")
        metric, mass, scale = np.zeros((0, d), np.float32), np.ones(n), 1.0
        if weights is not None:
            if tuple(weights.shape) not in ((n,), (n, d)):
                raise PlanError(f"weights must be ({n},) or ({n}, {d}), but are {tuple(weights.shape)}")
            w = _float32(weights, "weights")
            if w.min() < 0:
                raise WeightError(f"weights must not be negative, but the least is {w.min()}")
            if weights.ndim == 1:
                mass = w.astype(np.float64)
            elif w.max() > 0:
                scale = 2.0 ** -math.frexp(float(w.max()))[1]  # a power of two: exact, and far from underflow
                metric = (w * scale).astype(np.float32)
            else:
                metric = w
        return _Data(_widen(x), _widen(metric), mass, scale, d, chunk_bytes)

    @property
    def weights(self) -> np.ndarray:
        """(n, 1) ones or (n, width): what each coordinate weighs beside `mass`."""
        return self.metric if len(self.metric) else np.ones((len(self.points), 1), np.float32)

    def take(self, rows: np.ndarray) -> _Data:
        metric = self.metric[rows] if len(self.metric) else self.metric
        return _Data(self.points[rows], metric, self.mass[rows], self.scale, self.d, self.chunk_bytes)

    def means(self, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        """(k, d) float32 weighted means; a coordinate without weight stays as it is in `centroids`."""
        sums, mass = kernels().sums(self.points, self.metric, self.mass, labels, len(centroids))
        means = centroids.astype(np.float64)
        sums, mass = sums[:, : self.d], np.broadcast_to(mass[:, : self.d], means.shape)
        return np.divide(sums, mass, out=means, where=mass > 0).astype(np.float32)

    def variance(self) -> float:
        """Weighted variance of a coordinate, mean over the coordinates."""
        mean = self.means(np.zeros(len(self.points), np.int64), np.zeros((1, self.d), np.float32))
        square = (self.points[:, : self.d].astype(np.float64) - mean) ** 2
        if not len(self.metric):
            return float(np.einsum("n,nd->", self.mass, square) / self.mass.sum()) / self.d
        weights = self.mass[:, None] * self.metric[:, : self.d]
        total = np.maximum(weights.sum(0), np.finfo(np.float64).tiny)
        return float((np.einsum("nd,nd->d", weights, square) / total).mean())


def _float32(tensor: Tensor, name: str) -> np.ndarray:
    array = tensor.detach().to("cpu", torch.float32).numpy()
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise WeightError(f"{name} must be finite in float32, but {bad} of {array.size} values are not")
    return array


def _widen(array: np.ndarray) -> np.ndarray:
    """A copy with columns of zeros up to a multiple of four, the kernels' step."""
    rows, d = array.shape
    wide = np.zeros((rows, -(-d // 4) * 4), np.float32)
    wide[:, :d] = array
    return wide


def _codewords(data: _Data, centroids: np.ndarray, project: Project | None) -> np.ndarray:
    """(k, width) float32: what points are compared with."""
    if project is not None:
        projected = project(torch.from_numpy(centroids.copy()))
        if projected.shape != centroids.shape:
            raise PlanError(f"project must keep shape {centroids.shape}, but gave {tuple(projected.shape)}")
        centroids = _float32(projected, "projected centroids")
    elif centroids.ndim != 2 or centroids.shape[1] != data.d or not len(centroids):
        raise PlanError(f"centroids must be (k, {data.d}) with k >= 1, but have shape {centroids.shape}")
    elif not np.isfinite(centroids).all():
        raise WeightError("centroids must be finite in float32")
    return _widen(centroids)


def _lloyd(
    data: _Data, centroids: np.ndarray, iterations: int, limit: float, project: Project | None = None
) -> Clustering:
    """Lloyd's iteration from (k, d) float32 centroids until their squared shift is within `limit`."""
    search, centroids = _Search(data), centroids.copy()
    best, previous, settled = None, None, False
    for step in range(iterations + 1):
        labels, costs = search(_codewords(data, centroids, project))
        while costs.any() and len(empty := _absent(labels, len(centroids))):
            picks = _costliest(data, costs, len(empty))
            centroids[empty[: len(picks)]] = data.points[picks, : data.d]
            labels, costs = search(_codewords(data, centroids, project))
            if project is not None:
                break  # rounding may merge codewords for good
        inertia = float(costs.sum()) / data.scale
        if best is None or inertia < best.inertia:
            best = Clustering(torch.from_numpy(centroids), torch.from_numpy(labels), inertia, step)
        if settled or (previous is not None and np.array_equal(labels, previous)):
            break
        moved = data.means(labels, centroids)
        settled = float(((moved.astype(np.float64) - centroids) ** 2).sum()) <= limit
        centroids, previous = moved, labels
    assert best is not None
    return Clustering(best.centroids, best.labels, best.inertia, step)


def _optimum(data: _Data, k: int) -> np.ndarray:
    """(k, 1) centroids of points of one coordinate, the last one repeated where there are no more distinct points."""
    centroids = optimal_centroids(data.points[:, 0], k, data.mass * data.weights[:, 0])
    return np.pad(centroids, (0, k - len(centroids)), mode="edge")[:, None]


def _absent(labels: np.ndarray, k: int) -> np.ndarray:
    return np.flatnonzero(np.bincount(labels, minlength=k) == 0)


def _costliest(data: _Data, costs: np.ndarray, count: int) -> list[int]:
    """Up to `count` points that cost most, each after the ones before it became codewords."""
    picks: list[int] = []
    while len(picks) < count and costs.any():
        picks.append(int(costs.argmax()))
        gap = data.points.astype(np.float64) - data.points[picks[-1]]
        costs = np.minimum(costs, data.mass * (data.weights * gap**2).sum(1))
    return picks


class _Search:
    """Exact nearest codewords of the same points, again and again.

    A point whose codeword is nearer than a lower bound on all others keeps it; the bound follows from the
    last full comparison and how far codewords moved since (Hamerly 2010). It needs one metric for all points.
    """

    def __init__(self, data: _Data) -> None:
        self.data = data
        self.labels = np.zeros(len(data.points), np.int64)
        self.lower = np.zeros(len(data.points))
        self.codewords: np.ndarray | None = None

    def __call__(self, codewords: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) labels and (n,) weighted squared distances for (k, width) codewords."""
        n, k = len(self.labels), len(codewords)
        drift = np.zeros(k)  # of the codeword, other than this one, that moved farthest
        if self.codewords is not None and k > 1:
            moved = np.sqrt(((codewords.astype(np.float64) - self.codewords) ** 2).sum(1))
            second, first = np.argsort(moved, kind="stable")[-2:]
            drift[:] = moved[first]
            drift[first] = moved[second]
        self.codewords = codewords
        costs = np.empty(n)
        kernel = kernels().nearest[len(self.data.metric) > 0]

        def search(rows: slice) -> None:
            metric = self.data.metric[rows] if len(self.data.metric) else self.data.metric
            kernel(
                self.data.points[rows], metric, codewords, drift * (1 + 1e-12), self.labels[rows],
                self.lower[rows], costs[rows], self.data.chunk_bytes,
            )  # fmt: skip

        threads = torch.get_num_threads() if n * codewords.size > 1 << 22 else 1
        if threads == 1:
            search(slice(n))
        else:
            parts = [slice(n * part // threads, n * (part + 1) // threads) for part in range(threads)]
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(search, parts))
        return self.labels.copy(), costs * self.data.mass


def _seeds(data: _Data, k: int, restarts: int, generator: torch.Generator | None) -> np.ndarray:
    """(restarts, k) points to start from; the last one repeated where there are no more distinct points."""
    rows, size = np.arange(len(data.points)), max(SEEDING_POINTS * k, 4096)
    mass = data.mass
    if len(rows) > size:
        # Half of the sample follows the weights, half the squared distance to the mean: far points are met.
        weights = (data.mass[:, None] * data.weights).mean(1)
        mean = data.means(np.zeros(len(rows), np.int64), np.zeros((1, data.d), np.float32))
        far = data.mass * (data.weights * (data.points - _widen(mean)).astype(np.float64) ** 2).sum(1)
        density = weights / weights.sum() + far / max(far.sum(), np.finfo(np.float64).tiny)
        chance = np.cumsum(density)
        draws = _uniform((size,), generator) * chance[-1]
        rows = np.minimum(np.searchsorted(chance, draws, side="right"), len(chance) - 1)
        mass = data.mass[rows] / density[rows]
    uniforms = _uniform((restarts, k, 2 + int(math.log(k))), generator)
    picks = rows[_plus_plus(data.take(rows), mass, uniforms)]
    if len(rows) < len(data.points) and k > 1 and (picks[:, -1] == picks[:, -2]).any():
        picks = _plus_plus(data, data.mass, uniforms)  # the sample had too few distinct points
    return picks


def _plus_plus(data: _Data, mass: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(restarts, k) indices by greedy k-means++ from (restarts, k, tries) numbers in [0, 1)."""
    columns = np.ascontiguousarray(data.points[:, : data.d].T.astype(np.float64))
    metric = np.ascontiguousarray(data.metric[:, : data.d].T)
    closer, n = functools.partial(kernels().closer, columns, metric), len(data.points)
    far = np.full(n, np.inf)
    table = closer(far, np.arange(n)) if 8 * n * n <= data.chunk_bytes else None  # serves all restarts
    picks = np.zeros(uniforms.shape[:2], np.int64)
    for chosen, numbers in zip(picks, uniforms, strict=True):
        closest = data.weights.mean(1, dtype=np.float64)  # the first one is drawn by weight alone
        for j, number in enumerate(numbers):
            cumulative = np.cumsum(mass * closest)
            if cumulative[-1] == 0:
                chosen[j:] = chosen[j - 1]  # no distinct points are left
                break
            tries = np.minimum(np.searchsorted(cumulative, number * cumulative[-1], side="right"), n - 1)
            closest = closest if j else far
            nearer = closer(closest, tries) if table is None else np.minimum(table[tries], closest)
            best = np.einsum("tn,n->t", nearer, mass).argmin()
            chosen[j], closest = tries[best], nearer[best]
    return picks


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> np.ndarray:
    device = "cpu" if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device).cpu().numpy()
