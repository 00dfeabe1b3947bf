"""Random rotations, which make any weights look Gaussian (Chee et al. 2023, "QuIP"; Tseng et al. 2024, "QuIP#")."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bitbook.blocks import matrix_shape
from bitbook.errors import PlanError
from bitbook.transforms.transform import Transform


@dataclass(frozen=True, repr=False)
class Rotated(Transform):
    """The inner recipe works on `W Rᵀ`, where R mixes the inputs (columns); the decoder multiplies by R.

    R is random signs, then a Hadamard transform, orthogonal for any number of columns: see `rotate`.  It takes a seed
    and no bytes.  An outlier becomes one noise among many, which suits fixed-rate and lattice quantizers; what made
    weights cheap to entropy-code (zeros, heavy tails) is lost, and so are dead inputs.

    Errors of `W` and of `W Rᵀ` are equally large, but do not lie in the same places: a diagonal importance does not
    stay diagonal.  What remains of it is each row's mean: the diagonal of R · diag(m) · Rᵀ where all columns mix
    evenly.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise PlanError(f"Rotated(seed={self.seed!r}): use a whole number from 0 to 2^32 - 1")

    def forward(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return rotate(w.reshape(matrix_shape(tuple(w.shape))), self.seed).reshape(w.shape)

    def back(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return rotate_back(x.reshape(matrix_shape(tuple(x.shape))), self.seed).reshape(x.shape)

    def importance_of(self, w: Tensor, importance: Tensor | None, own: Mapping[str, Tensor]) -> Tensor | None:
        if importance is None:
            return None
        rows = importance.reshape(matrix_shape(tuple(w.shape)))
        return rows.mean(1, keepdim=True).expand(rows.shape).reshape(w.shape)


def rotate(w: Float[Tensor, "rows n"], seed: int) -> Float[Tensor, "rows n"]:
    """Rotate each row: orthogonal up to rounding, for any n.

    With p the largest power of two up to n: signs, then the Hadamard transform of the first p columns; unless n = p,
    then new signs and the same for the last p columns, then new signs and again the first p.  Everything is float64
    until the end, in an order that is part of the file format, so that all platforms give the same bits.
    """
    if not w.numel():
        return w
    x = w.double()
    for signs, start in _passes(w.shape[1], seed):
        x = _hadamard(x * signs.to(x.device), start)
    return x.to(w.dtype)


def rotate_back(x: Float[Tensor, "rows n"], seed: int) -> Float[Tensor, "rows n"]:
    """Undo `rotate`: its passes in reverse."""
    if not x.numel():
        return x
    w = x.double()
    for signs, start in reversed(_passes(x.shape[1], seed)):
        w = _hadamard(w, start) * signs.to(w.device)
    return w.to(x.dtype)


def _hadamard(x: Float[Tensor, "rows n"], start: int) -> Float[Tensor, "rows n"]:
    """The columns from `start` times the matrix (-1)^popcount(i & j) / √p, its own inverse; the others as they are."""
    rows, n = x.shape
    p = _power(n)
    part = x[:, start : start + p]
    span = 1
    while span < p:
        pairs = part.reshape(rows, -1, 2, span)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        part = torch.stack((first + second, first - second), 2).reshape(rows, p)
        span *= 2
    return torch.cat((x[:, :start], part * (1 / math.sqrt(p)), x[:, start + p :]), 1)


def random_signs(count: int, seed: int) -> Float[np.ndarray, " count"]:
    """±1 from the bits of SplitMix64 (Steele, Lea & Flood 2014): bit i mod 64, the lowest first, of output i div 64.

    A set bit is -1.  Output k, from 0, of a seed s mixes s + (k + 1) · 0x9E3779B97F4A7C15 modulo 2^64.
    """
    z = np.uint64(seed) + np.arange(1, count // 64 + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bits = z[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    return 1.0 - 2.0 * bits.reshape(-1)[:count].astype(np.float64)


@functools.lru_cache(maxsize=64)
def _passes(n: int, seed: int) -> list[tuple[Tensor, int]]:
    """The signs of all n columns, and the first column of the Hadamard transform, for each pass."""
    p = _power(n)
    starts = (0,) if n == p else (0, n - p, 0)
    signs = torch.from_numpy(random_signs(n * len(starts), seed)).reshape(len(starts), n)
    return list(zip(signs, starts, strict=True))


def _power(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << n.bit_length() - 1
