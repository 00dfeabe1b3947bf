"""The same codes through every coder: `python -m bench.coding [FILES.npz ...] [--json PATH]`.

Each file holds integer matrices; all of a file's matrices are one group.  Without files, a sparse layer is made up.
The order-0 entropy is that of each matrix by itself, without tables.  Peers that are installed are measured, too:
`pip install constriction zstandard`; NNCodec (DeepCABAC) wants its own environment: `pip install nncodec`.
Speeds are symbols per second of processor time, decoding, after one call for warming up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bitbook.coding.choose import Smallest
from bitbook.coding.coder import Coder
from bitbook.coding.context import Context
from bitbook.coding.rans import Rans
from bitbook.quantizer import Stream, StreamSpec

CODERS: dict[str, Coder] = {
    "Smallest": Smallest(),
    "Context small": Context("small"),
    "Context fast": Context("fast"),
    "Rans": Rans(),
}


class Result(NamedTuple):
    """One coder on one group."""

    group: str
    coder: str
    bytes: float
    decode_symbols_per_second: float | None


def made_up(rows: int = 128, side: int = 28, seed: int = 0) -> list[np.ndarray]:
    """A layer over an image: few non-zeros, most of them at the centre, magnitudes geometric."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    density = 0.12 * np.exp(-(x**2 + y**2) / (side / 4) ** 2).reshape(-1) * rng.gamma(1, 1, (rows, 1))
    nonzero = rng.random((rows, side * side)) < density
    size = rng.geometric(0.6, nonzero.shape)
    return [(nonzero * size * rng.choice([-1, 1], nonzero.shape)).astype(np.int32)]


def entropy(matrix: np.ndarray) -> float:
    """Bytes at the symbols' own frequencies."""
    counts = np.unique(matrix, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def seconds(call: Callable[[], object]) -> float:
    call()
    start = time.process_time()
    repetitions = 0
    while time.process_time() - start < 0.2:
        call()
        repetitions += 1
    return (time.process_time() - start) / repetitions


def constriction_bytes(matrix: np.ndarray) -> int:
    """Its range coder with the matrix's own frequencies; the table is not counted."""
    import constriction  # type: ignore[import-not-found]

    symbols, indices, counts = np.unique(matrix, return_inverse=True, return_counts=True)
    if len(symbols) == 1:
        return 0
    model = constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(indices.reshape(-1).astype(np.int32), model)
    return 4 * len(encoder.get_compressed())


def measure(group: str, matrices: Sequence[np.ndarray]) -> list[Result]:
    streams = [
        Stream(StreamSpec(f"codes{i}", (len(m), m[0].size), None), torch.from_numpy(m.astype(np.int32)))
        for i, m in enumerate(matrices)
    ]
    specs = [stream.spec for stream in streams]
    symbols = sum(m.size for m in matrices)
    results = [Result(group, "order-0 entropy", round(sum(map(entropy, matrices)), 1), None)]
    for name, coder in CODERS.items():
        data = coder.encode(streams)
        speed = symbols / seconds(lambda c=coder, d=data: c.decode(d, specs))
        results.append(Result(group, name, len(data), speed))
    if importlib.util.find_spec("constriction"):
        results.append(Result(group, "constriction, order 0", sum(map(constriction_bytes, matrices)), None))
    raw = b"".join(np.clip(m, -128, 127).astype(np.int8).tobytes() for m in matrices)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    results.append(Result(group, "xz", len(lzma.compress(raw, lzma.FORMAT_RAW, filters=filters)), None))
    if importlib.util.find_spec("zstandard"):
        import zstandard  # type: ignore[import-not-found]

        results.append(Result(group, "zstd 22", len(zstandard.ZstdCompressor(level=22).compress(raw)), None))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    groups = {"made up": made_up()}
    if options.files:
        groups = {path.stem: list(np.load(path).values()) for path in options.files}
    results = [result for name, matrices in groups.items() for result in measure(name, matrices)]
    for result in results:
        speed = result.decode_symbols_per_second
        print(
            f"{result.group:16} {result.coder:24} {result.bytes:10,.0f} B", f"{speed / 1e6:8.1f} M/s" if speed else ""
        )
    for name in dict.fromkeys(result.coder for result in results):
        print(f"{'all':16} {name:24} {sum(r.bytes for r in results if r.coder == name):10,.0f} B")
    if options.json:
        options.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
