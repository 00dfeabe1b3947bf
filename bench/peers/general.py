"""constriction and zstd on the integers of a group: `python general.py GROUP.npz`.

Runs in an environment of its own and prints `{coder: {bytes, seconds}}`.
"""

from __future__ import annotations

import json
import sys

import constriction  # type: ignore[import-not-found]
import numpy as np
import zstandard  # type: ignore[import-not-found]
from timing import seconds


def by_constriction(matrix: np.ndarray) -> tuple[int, float]:
    """Bytes and seconds of its range coder at the matrix's own frequencies; the table is not counted."""
    symbols, indices, counts = np.unique(matrix, return_inverse=True, return_counts=True)
    if len(symbols) == 1:
        return 0, 0.0
    indices = indices.reshape(-1).astype(np.int32)
    model = constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(indices, model)
    data = encoder.get_compressed()

    def decode() -> np.ndarray:
        return constriction.stream.queue.RangeDecoder(data).decode(model, len(indices))

    if not np.array_equal(decode(), indices):
        sys.exit("constriction: the symbols do not come back")
    return 4 * len(data), seconds(decode)


def main() -> None:
    matrices = list(np.load(sys.argv[1]).values())
    ours = [by_constriction(matrix) for matrix in matrices]
    raw = b"".join(matrix.astype(np.int8 if abs(matrix).max() < 128 else "<i4").tobytes() for matrix in matrices)
    data = zstandard.ZstdCompressor(level=22).compress(raw)
    results = {
        "constriction, order 0": {"bytes": sum(b for b, _ in ours), "seconds": sum(s for _, s in ours)},
        "zstd 22": {"bytes": len(data), "seconds": seconds(lambda: zstandard.ZstdDecompressor().decompress(data))},
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
