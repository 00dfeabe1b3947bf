"""kmeans1d and ckwrap on scalars: `python line.py SCALARS.npz K`.

Runs in an environment of its own and prints `{library: {seconds, centroids}}`.  ckwrap gets the weights, kmeans1d knows
none.
"""

from __future__ import annotations

import json
import sys

import ckwrap  # type: ignore[import-not-found]
import kmeans1d  # type: ignore[import-not-found]
import numpy as np
from timing import seconds


def main() -> None:
    file, k = np.load(sys.argv[1]), int(sys.argv[2])
    points, weights = file["points"], file["weights"].astype(np.float64)
    doubles = points.astype(np.float64)  # as ckwrap wants them
    results = {
        "kmeans1d": {
            "seconds": seconds(lambda: kmeans1d.cluster(points, k)),
            "centroids": list(kmeans1d.cluster(points, k).centroids),
        },
        "ckwrap, weighted": {
            "seconds": seconds(lambda: ckwrap.ckmeans(doubles, k, weights=weights)),
            "centroids": ckwrap.ckmeans(doubles, k, weights=weights).centers.tolist(),
        },
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
