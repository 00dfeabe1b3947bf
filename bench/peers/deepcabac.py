"""DeepCABAC (Wiedemann et al. 2020) in NNCodec, on the integers as they are: `python deepcabac.py GROUP.npz`.

Runs in an environment of its own and prints `{coder: {bytes, seconds}}`.  Its quantizer is passed by: the arithmetic
coder gets the matrices of the group one after the other.  Of four settings (both profiles of the standard, the second
with its list of empty rows; start and rates of each context searched or not) the smallest counts, without headers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
from nncodec.extensions import deepCABAC  # type: ignore[import-not-found]
from timing import seconds

UNARY = 11  # NNCodec's default
OFF = (deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8))  # no earlier version of the model to predict from


def encode(matrices: Sequence[np.ndarray], profile: int, search: int) -> np.ndarray:
    encoder = deepCABAC.Encoder()
    for matrix in matrices:
        encoder.initCtxModels(UNARY, search)
        empty = (~matrix.any(1)).astype(np.int32)
        encoder.encodeLayer(matrix, 0, 0, profile, 0, profile, empty, *OFF, 0, 0)
    return np.array(encoder.finish())


def decode(data: np.ndarray, shapes: Sequence[tuple[int, int]], profile: int) -> list[np.ndarray]:
    decoder = deepCABAC.Decoder()
    decoder.setStream(data)
    matrices = [np.zeros(shape, np.int32) for shape in shapes]
    for matrix in matrices:
        decoder.initCtxModels(UNARY)
        decoder.decodeLayer(matrix, 0, 0, profile, 0, *OFF, 0, 0)
    decoder.finish()
    return matrices


def main() -> None:
    matrices = [m.reshape(len(m), -1).astype(np.int32) for m in np.load(sys.argv[1]).values()]
    shapes = [m.shape for m in matrices]
    coded = {p: min((encode(matrices, p, s) for s in (0, 1)), key=len) for p in (0, 1)}
    profile, data = min(coded.items(), key=lambda pair: len(pair[1]))
    if not all(map(np.array_equal, decode(data, shapes, profile), matrices)):
        sys.exit("the matrices do not come back")
    took = seconds(lambda: decode(data, shapes, profile))
    print(json.dumps({"DeepCABAC": {"bytes": len(data), "seconds": took}}))


if __name__ == "__main__":
    main()
