"""What a result keeps of a file's weights, so that a report can draw them without the file.

    float start, artifact ──► per matrix: histogram before, levels or histogram after
                         └──► rows of the first layer as images before and after, codewords

Some kilobytes a file: images have 33 colours and are PNGs.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitbook.artifact import Artifact
from bitbook.quantizer import Quantized

BINS = 48
MOST_LEVELS = 64
"""Different values up to which a tensor's levels are counted one by one."""
ROWS = 8
"""Rows of the first layer that are shown: those of the largest norm before, the same for all files of a start."""
MOST_CODEWORDS = 64
LONG = 16
"""Numbers in a codeword beyond which it is drawn as a row and not as a column."""
_SHADES = 32  # an odd number with zero in the middle, and one for the gaps between images
_NEGATIVE, _POSITIVE, _GAP = (0, 114, 178), (213, 94, 0), (255, 255, 255)  # told apart by every kind of eye


def sketch(start: Mapping[str, Tensor], artifact: Artifact, input_shape: Sequence[int]) -> list[dict[str, Any]]:
    """One JSON-able dict for each matrix of `start` that the artifact holds, in the file's order.

    start: the float weights that the file came from, by name. input_shape: of one example; where it is a square of
    one channel, rows of the first matrix that have its size become images.

    Keys: `tensor`, `low`, `high` (the range of both), `before` (counts of BINS bins), then either `levels` (pairs of
    value and count, where there are at most MOST_LEVELS) or `after` (counts). Where there are images, each as
    base64 of a PNG: `rows` with `before` and `after`, `codewords` with the `picture`, how many are `shown` of how
    many in `total`, the most used first, and what `each` is in it: "image", "row" or "column".
    """
    height, width = (0, 0, *input_shape)[-2:]
    square = width if height == width and math.prod(input_shape) == width * width else None
    found = []
    for name, stored in artifact.tensors.items():
        before = start.get(name)
        if before is None or before.dim() < 2:
            continue
        before, after = before.float(), artifact.decode(name).float()
        drawn = {"tensor": name, **_histograms(before, after)}
        reach = before.abs().max().item()
        image = square if not found and square and before.shape[1:].numel() == square * square else None
        if image:
            chosen = before.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:ROWS]
            both = (w.flatten(1)[chosen].reshape(-1, image, image) for w in (before, after))
            drawn["rows"] = dict(zip(("before", "after"), (_png(_tiles(rows), reach) for rows in both), strict=True))
        if isinstance(stored, Quantized) and "centroids" in stored.side and len(stored.codes) == 1:
            drawn["codewords"] = _codewords(stored, reach, image)
        found.append(drawn)
    return found


def _histograms(before: Tensor, after: Tensor) -> dict[str, Any]:
    low = min(before.min().item(), after.min().item())
    high = max(before.max().item(), after.max().item())
    found = {"low": _short(low), "high": _short(high), "before": _counts(before, low, high)}
    values, counts = after.unique(return_counts=True)
    if len(values) <= MOST_LEVELS:
        return {**found, "levels": [[_short(v), n] for v, n in zip(values.tolist(), counts.tolist(), strict=True)]}
    return {**found, "after": _counts(after, low, high)}


def _counts(w: Tensor, low: float, high: float) -> list[int]:
    if low == high:  # torch.histc widens such a range
        return [0] * (BINS // 2) + [w.numel()] + [0] * (BINS - BINS // 2 - 1)
    return torch.histc(w, BINS, low, high).int().tolist()


def _codewords(stored: Quantized, reach: float, image: int | None) -> dict[str, Any]:
    (codes,) = stored.codes.values()
    words = stored.side["centroids"].decode().flatten(1)
    used = torch.bincount(codes.flatten().long(), minlength=len(words)).argsort(descending=True, stable=True)
    if image is not None and words.shape[1] == image * image:
        each, shown = "image", words[used[:ROWS]]
        picture = _tiles(shown.reshape(-1, image, image))
    elif words.shape[1] > LONG:
        each, shown = "row", words[used[: 2 * ROWS]]
        picture = shown
    else:
        each, shown = "column", words[used[:MOST_CODEWORDS]]
        picture = shown.T
    return {"picture": _png(picture, reach), "shown": len(shown), "total": len(words), "each": each}


def _tiles(images: Float[Tensor, "n height width"]) -> Float[Tensor, "height columns"]:
    """Images side by side, with a column of NaN between them."""
    gap = images.new_full((images.shape[1], 1), math.nan)
    return torch.cat([part for image in images for part in (image, gap)][:-1], 1)


def _png(pixels: Float[Tensor, "height width"], reach: float) -> str:
    """Base64 of a PNG in which -reach is blue, zero white, +reach orange, and NaN a gap (PNG specification, 11.2)."""
    middle = (_SHADES - 1) // 2
    shades = (pixels / (reach or 1) * middle).round().clamp(-middle, middle) + middle
    indices = shades.nan_to_num(nan=_SHADES - 1).to(torch.uint8)
    palette = bytes(channel for i in range(_SHADES - 1) for channel in _colour(i / middle - 1)) + bytes(_GAP)
    height, width = indices.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in indices.contiguous())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return base64.b64encode(data).decode()


def _colour(share: float) -> list[int]:
    end = _POSITIVE if share > 0 else _NEGATIVE
    return [round(255 + (channel - 255) * abs(share)) for channel in end]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
