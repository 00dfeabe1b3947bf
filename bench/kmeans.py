"""k-means of bitbook, scikit-learn and faiss on the same points: `python -m bench.kmeans [--json PATH]`.

All get the same iterations (they end early only where no label changes), restarts and threads; faiss does not
subsample. Repetitions are interleaved, so that a slow moment of the machine meets all three; a ratio is the
median of the ratios within a repetition. Inertia is computed here, in float64, from each one's centroids.
bitbook and scikit-learn seed by greedy k-means++, which costs time; faiss starts from random points.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitbook.vector.kmeans import assign, kmeans

FAISS_INSTALL = "pip install faiss-cpu"


@dataclass(frozen=True)
class Case:
    """Gauss points and what to do with them."""

    n: int
    d: int
    k: int
    restarts: int = 1
    iterations: int = 25

    def __str__(self) -> str:
        return f"{self.n:,} x {self.d}, k={self.k}, restarts={self.restarts}, iterations={self.iterations}"


CASES = (Case(100_000, 4, 256), Case(100_000, 8, 256), Case(100_000, 2, 64), Case(128, 784, 12, restarts=10))

Run = Callable[[np.ndarray, Case, int], np.ndarray]  # points, case, seed -> centroids (k, d)


def run_bitbook(points: np.ndarray, case: Case, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    found = kmeans(
        torch.from_numpy(points), case.k, restarts=case.restarts, iterations=case.iterations, tolerance=0,
        generator=generator,
    )  # fmt: skip
    return found.centroids.numpy()


def run_sklearn(points: np.ndarray, case: Case, seed: int) -> np.ndarray:
    import warnings

    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reports that the iterations ended before convergence, as asked for
        model = KMeans(case.k, max_iter=case.iterations, tol=0, random_state=seed)
        model.set_params(n_init=case.restarts)  # its signature is typed as a string
        return model.fit(points).cluster_centers_


def run_faiss(points: np.ndarray, case: Case, seed: int) -> np.ndarray:
    import faiss  # pyright: ignore[reportMissingImports]

    model = faiss.Kmeans(
        case.d, case.k, niter=case.iterations, nredo=case.restarts, seed=seed + 1,
        min_points_per_centroid=1, max_points_per_centroid=len(points),
    )  # fmt: skip
    model.train(points)
    return model.centroids


def inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    labels = assign(torch.from_numpy(points), torch.from_numpy(np.asarray(centroids, np.float32))).numpy()
    return float(((points.astype(np.float64) - centroids[labels]) ** 2).sum())


def measure(case: Case, runs: dict[str, Run], repetitions: int) -> list[dict[str, object]]:
    """One row per library; the first repetition, which compiles and loads, is not counted."""
    points = np.random.default_rng(0).standard_normal((case.n, case.d)).astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            centroids = run(points, case, repetition)
            elapsed = time.perf_counter() - start
            if repetition > 0:
                seconds[name].append(elapsed)
                costs[name].append(inertia(points, centroids))

    def ratio(values: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(values["bitbook"], values[name], strict=True))

    return [
        {
            "case": str(case),
            "library": name,
            "median_seconds": statistics.median(seconds[name]),
            "mean_inertia": statistics.fmean(costs[name]),
            "time_ratio": ratio(seconds, name),
            "inertia_ratio": statistics.fmean(costs["bitbook"]) / statistics.fmean(costs[name]),
        }
        for name in runs
    ]


def main() -> None:
    """Measure all cases, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description="Compare k-means of bitbook, scikit-learn and faiss.")
    parser.add_argument("--threads", type=int, default=1, help="threads of every library (default 1)")
    parser.add_argument("--repetitions", type=int, default=5, help="counted repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()

    runs: dict[str, Run] = {"bitbook": run_bitbook}
    skipped: dict[str, str] = {}
    torch.set_num_threads(options.threads)
    if importlib.util.find_spec("sklearn"):
        import sklearn.cluster  # noqa: F401  loads its OpenMP, which the next line limits
        from threadpoolctl import threadpool_limits

        threadpool_limits(options.threads)
        runs["scikit-learn"] = run_sklearn
    else:
        skipped["scikit-learn"] = "pip install 'bitbook[study]'"
    if importlib.util.find_spec("faiss"):
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(options.threads)
        runs["faiss"] = run_faiss
    else:
        skipped["faiss"] = FAISS_INSTALL

    rows: list[dict[str, object]] = []
    print(f"{'library':<14}{'median s':>10}{'bitbook/it':>12}{'mean inertia':>16}{'bitbook/it':>12}")
    for case in CASES:
        print(case)
        for row in measure(case, runs, options.repetitions):
            print(
                f"  {row['library']:<12}{row['median_seconds']:>10.4f}{row['time_ratio']:>12.2f}"
                f"{row['mean_inertia']:>16,.2f}{row['inertia_ratio']:>12.4f}"
            )
            rows.append(row)
        for name, install in skipped.items():
            print(f"  {name:<12}skipped: not installed; run: {install}")
            rows.append({"case": str(case), "library": name, "skipped": install})
    if options.json:
        report = {"threads": options.threads, "repetitions": options.repetitions, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
