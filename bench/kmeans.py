"""k-means of bitbook, scikit-learn and faiss on the same points: `python -m bench.kmeans [--json PATH]`.

All get the same iterations (they end early only where no label changes), restarts and threads; faiss does not
subsample. Repetitions are interleaved, so that a slow moment of the machine meets all three; a ratio is the
median of the ratios within a repetition. Inertia is computed here, in float64, from each one's centroids.
bitbook and scikit-learn seed by greedy k-means++, which costs time; faiss starts from random points.

On a line the optimum is known: there kmeans1d, and with weights ckwrap, are the peers, by seconds of processor time.
They run in an environment of their own, `.bench/line`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from bench.peers.environments import environment, own_variables

from bitbook.vector.kmeans import assign, kmeans
from bitbook.vector.line import optimal_centroids

HERE = Path(__file__).parent
FAISS_INSTALL = "pip install faiss-cpu"
LINE = ("numpy==2.4.6", "ckwrap==1.2.3", "kmeans1d==0.5.0")
LINE_CASES = ((100_000, 16), (10_000, 16), (100_000, 256))


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


def processor_seconds(call: Callable[[], object], repetitions: int) -> float:
    """The mean, after a call that compiles and loads."""
    call()
    start = time.process_time()
    for _ in range(repetitions):
        call()
    return (time.process_time() - start) / repetitions


def measure_line(n: int, k: int, repetitions: int, python: Path | str) -> list[dict[str, object]]:
    """bitbook with and without weights, each beside its peer, where `python` has them."""
    rng = np.random.default_rng(0)
    points, weights = rng.standard_normal(n).astype(np.float32), rng.uniform(0.1, 1, n).astype(np.float32)
    peers: dict[str, dict[str, object]] = {}
    if isinstance(python, Path):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scalars.npz"
            np.savez(path, points=points, weights=weights)
            command = [python, HERE / "peers" / "line.py", path, str(k)]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=own_variables())
        peers = json.loads(run.stdout)
    rows: list[dict[str, object]] = []
    for own, peer, mass in (("bitbook", "kmeans1d", None), ("bitbook, weighted", "ckwrap, weighted", weights)):
        took = processor_seconds(lambda mass=mass: optimal_centroids(points, k, mass), repetitions)
        found = {own: (took, optimal_centroids(points, k, mass))}
        if peer in peers:
            found[peer] = (cast(float, peers[peer]["seconds"]), np.array(peers[peer]["centroids"]))
        costs = {name: line_cost(points, centroids, mass) for name, (_, centroids) in found.items()}
        rows += [
            {
                "case": f"{n:,} scalars, k={k}",
                "library": name,
                "median_seconds": spent,
                "mean_inertia": costs[name],
                "time_ratio": took / spent,
                "inertia_ratio": costs[own] / costs[name],
            }
            for name, (spent, _) in found.items()
        ]
    return rows


def line_cost(points: np.ndarray, centroids: np.ndarray, weights: np.ndarray | None) -> float:
    middles = (centroids[1:].astype(np.float64) + centroids[:-1]) / 2
    square = (points.astype(np.float64) - centroids[np.searchsorted(middles, points)]) ** 2
    return float((square if weights is None else square * weights).sum())


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

    def show(row: dict[str, object]) -> None:
        rows.append(row)
        print(
            f"  {row['library']:<18}{row['median_seconds']:>10.4f}{row['time_ratio']:>12.2f}"
            f"{row['mean_inertia']:>16,.2f}{row['inertia_ratio']:>12.4f}"
        )

    print(f"{'library':<20}{'median s':>10}{'bitbook/it':>12}{'mean inertia':>16}{'bitbook/it':>12}")
    python = environment("line", LINE)
    for n, k in LINE_CASES:
        print(f"{n:,} scalars, k={k}")
        for row in measure_line(n, k, options.repetitions, python):
            show(row)
        if isinstance(python, str):
            print(f"  kmeans1d and ckwrap skipped: {python}")
            rows.append({"case": f"{n:,} scalars, k={k}", "library": "kmeans1d, ckwrap", "skipped": str(python)})
    for case in CASES:
        print(case)
        for row in measure(case, runs, options.repetitions):
            show(row)
        for name, install in skipped.items():
            print(f"  {name:<18}skipped: not installed; run: {install}")
            rows.append({"case": str(case), "library": name, "skipped": install})
    if options.json:
        report = {"threads": options.threads, "repetitions": options.repetitions, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
