"""Two baselines of a few lines: palettes by k-means, or rounding per output channel, and zstd over all of it.

One file: a line of JSON that says what follows (counted), then codes, palettes or scales, and the rest in float16;
codes as they are or packed, whichever is smaller.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import torch
from job import Made, Task, run

zstandard: Any = importlib.import_module("zstandard")
Coded = tuple[np.ndarray, np.ndarray, int]  # codes (one a byte), float16 palette or scales, bits


def kmeans(w: np.ndarray, bits: int) -> Coded:
    """Lloyd's iteration on scalars from equal quantiles; the palette belongs to the whole tensor."""
    flat = np.sort(w.reshape(-1).astype(np.float64))
    levels = np.unique(np.quantile(flat, (np.arange(2**bits) + 0.5) / 2**bits))
    sums = np.concatenate([[0], np.cumsum(flat)])
    for _ in range(300):
        edges = np.searchsorted(flat, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(flat)]])
        count = np.diff(edges)
        moved = np.where(count > 0, np.diff(sums[edges]) / np.maximum(count, 1), levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    levels = levels.astype(np.float16)
    codes = np.searchsorted((levels[1:].astype(float) + levels[:-1].astype(float)) / 2, w.reshape(-1))
    return codes.astype(np.uint8), levels, bits


def uniform(w: np.ndarray, bits: int) -> Coded:
    """Nearest of 2^bits - 1 symmetric levels, a scale for each output channel by its largest magnitude."""
    most = 2 ** (bits - 1) - 1
    rows = w.reshape(len(w), -1)
    scale = (abs(rows).max(1, keepdims=True) / most).astype(np.float16)
    codes = np.rint(rows / np.maximum(scale.astype(np.float32), 1e-8)).clip(-most, most) + most
    return codes.reshape(-1).astype(np.uint8), scale.reshape(-1), bits


def restore(kind: str, codes: np.ndarray, side: np.ndarray, bits: int, shape: list[int]) -> np.ndarray:
    side = side.astype(np.float32)
    if kind == "kmeans":
        return side[codes].reshape(shape)
    return ((codes.astype(np.float32) - (2 ** (bits - 1) - 1)).reshape(len(side), -1) * side[:, None]).reshape(shape)


def pack(codes: np.ndarray, bits: int) -> bytes:
    return np.packbits(((codes[:, None] >> np.arange(bits)) & 1).astype(np.uint8)).tobytes()


def unpack(data: bytes, bits: int, count: int) -> np.ndarray:
    planes = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return (planes << np.arange(bits)).sum(1).astype(np.uint8)


def compress(task: Task) -> Made:
    kind, quantized = task.setting["kind"], task.names(2, 4)
    coder = {"kmeans": kmeans, "uniform": uniform}[kind]
    coded = {name: coder(task.weights[name].numpy(), task.bits(name)) for name in quantized}
    plain = {name: w.half().numpy() for name, w in task.weights.items() if name not in coded}
    files = [_file(task, coded, plain, packed) for packed in (False, True)]
    data = min(files, key=len)
    (task.folder / "model.zst").write_bytes(data)
    return Made(_read((task.folder / "model.zst").read_bytes(), kind), quantized)


def _file(task: Task, coded: dict[str, Coded], plain: dict[str, np.ndarray], packed: bool) -> bytes:
    header = {
        "packed": packed,
        "tensors": [
            [name, list(w.shape), *(coded[name][2:] if name in coded else ())] for name, w in task.weights.items()
        ],
        "sides": [len(side) for _, side, _ in coded.values()],
    }
    body = [pack(codes, bits) if packed else codes.tobytes() for codes, _, bits in coded.values()]
    body += [side.tobytes() for _, side, _ in coded.values()] + [w.tobytes() for w in plain.values()]
    raw = json.dumps(header, separators=(",", ":")).encode() + b"\n" + b"".join(body)
    return zstandard.ZstdCompressor(level=22).compress(raw)


def _read(data: bytes, kind: str) -> dict[str, torch.Tensor]:
    raw = zstandard.ZstdDecompressor().decompress(data)
    line, _, body = raw.partition(b"\n")
    header, at, codes, dense = json.loads(line), 0, {}, {}

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return body[at - size : at]

    coded = [tensor for tensor in header["tensors"] if len(tensor) == 3]
    for name, shape, bits in coded:
        count = int(np.prod(shape))
        part = take(-(-count * bits // 8) if header["packed"] else count)
        codes[name] = unpack(part, bits, count) if header["packed"] else np.frombuffer(part, np.uint8)
    for (name, shape, bits), size in zip(coded, header["sides"], strict=True):
        dense[name] = restore(kind, codes[name], np.frombuffer(take(2 * size), np.float16), bits, shape)
    for name, shape in (tensor for tensor in header["tensors"] if len(tensor) == 2):
        dense[name] = np.frombuffer(take(2 * int(np.prod(shape))), np.float16).reshape(shape).astype(np.float32)
    return {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in dense.items()}


if __name__ == "__main__":
    run(compress)
