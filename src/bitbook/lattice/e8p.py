"""E8P: 2 bits per weight from a codebook that needs no storage (Tseng et al. 2024, "QuIP#", section 4.2)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Shape, check_block
from bitbook.errors import PlanError
from bitbook.lattice import kernels
from bitbook.lattice.vectors import Vectors, least
from bitbook.quantizer import Child, FitOptions, Quantizer, StreamSpec, code_dtype
from bitbook.scalar.leaves import Float
from bitbook.scalar.uniform import SMALLEST_SCALE

_PER_RMS = 0.97  # scale of the least error on Gaussian weights
_SHARES = [0.55 + 0.05 * i for i in range(18)]  # of the rms, that the mse rule tries
_CHUNK = 1 << 12  # vectors whose distances to all patterns are held at once


@dataclass(frozen=True, repr=False)
class E8P(Quantizer):
    """Vectors of eight neighbours in a row, each one of 2^16 points of E8 + ¼: `ŵ = s · (± a ± ¼)`.

    A pattern `a` of half integers is one of 256: the 227 of squared norm at most 10 (up to signs) and the first 29 of
    norm 12 (the paper lists 29 of its own choice; by symmetry all do the same on average).  Seven signs are free, the
    eighth makes the sum of `± a` even, and all eight coordinates move by +¼ or -¼ together.

    The two streams are the pattern and, in one byte, the signs and the shift.  On Gaussian weights both are nearly
    uniform: this is a code of fixed rate, whose decoder is a table of 256 rows.  The elements of a `block` share a
    scale: a fixed share of their rms, or, under the range rule "mse", the one with the least error among 18.
    """

    block: Block = WHOLE
    scale: Quantizer = Float("bfloat16")
    pad: bool = False

    learns_side = True

    def __post_init__(self) -> None:
        check_block(self.block)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = self._vectors(shape).grid
        return (StreamSpec("patterns", (grid.R, grid.C), 256), StreamSpec("signs", (grid.R, grid.C), 256))

    def children(self, shape: Shape) -> Mapping[str, Child]:
        blocks = self._vectors(shape).blocks
        return {"scale": Child(self.scale, (blocks.R, blocks.C))}

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        if options.range not in (None, "mse"):
            raise PlanError(f"range={options.range!r} does not fit {self!r}; use mse, or None for a share of the rms")
        vectors = self._vectors(tuple(w.shape))
        rms = vectors.rms(w).clamp_min(SMALLEST_SCALE)
        if options.range is None:
            return {"scale": _PER_RMS * rms}
        weights = torch.ones_like(w) if importance is None else importance

        def errors(share: float) -> Tensor:
            side = {"scale": share * rms}
            off = self.decode(self.encode(w, side), side, tuple(w.shape)) - w
            return vectors.blocks.mean(weights * off.square())

        return {"scale": least(errors, _SHARES) * rms}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        vectors = self._vectors(tuple(w.shape))
        x = vectors.in_steps(w, side["scale"]).float()
        search = kernels.nearest if kernels.serve(x) else nearest
        pattern, signs = search(x, patterns())
        shape = (vectors.grid.R, vectors.grid.C)
        if vectors.grid.padded and len(x):
            last = slice(shape[1] - 1, None, shape[1])
            pattern[last], signs[last] = nearest_cut(x[last], vectors.grid.cols - 8 * (shape[1] - 1))
        dtype = code_dtype(256)
        return {"patterns": pattern.to(dtype).reshape(shape), "signs": signs.to(dtype).reshape(shape)}

    def columns(self, shape: Shape) -> int:
        return self._vectors(shape).grid.c

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        vectors = self._vectors(shape)
        scale = side["scale"][:, start // vectors.blocks.c, None]
        return replace(self, block=(self.block[0], -1)), {"scale": scale}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        points = codewords(codes["patterns"].reshape(-1), codes["signs"].reshape(-1))
        return self._vectors(shape).in_weights(points.double(), side["scale"], shape)

    def _vectors(self, shape: Shape) -> Vectors:
        return Vectors.of(shape, 8, self.block, pad=self.pad)


@functools.cache
def patterns() -> F32[Tensor, "256 8"]:
    """Half integers of squared norm at most 10, then 29 of norm 12; each by norm, then in lexicographic order."""
    shells: dict[int, list[tuple[int, ...]]] = {}
    for odd in itertools.product((1, 3, 5), repeat=8):  # twice the pattern
        norm = sum(n * n for n in odd)
        if norm <= 48:
            shells.setdefault(norm, []).append(odd)
    chosen = [odd for norm in sorted(shells) for odd in (shells[norm][:29] if norm == 48 else shells[norm])]
    return torch.tensor(chosen, dtype=torch.float32) / 2


def codewords(pattern: Int[Tensor, " n"], signs: Int[Tensor, " n"]) -> F32[Tensor, "n 8"]:
    """Bit i of `signs` negates coordinate i below 7, bit 7 shifts by -¼ instead of +¼; the eighth sign follows."""
    size = patterns().to(pattern.device)[pattern.long()]
    bits = signs.long()[:, None] >> torch.arange(8, device=signs.device) & 1
    negative, shift = bits[:, :7], 0.25 - 0.5 * bits[:, 7:]
    odd = (size.sum(1, keepdim=True).long() + negative.sum(1, keepdim=True)) % 2  # negating one changes the parity
    return torch.where(torch.cat([negative, odd], 1) > 0, -size, size) + shift


def nearest(x: F32[Tensor, "n 8"], table: F32[Tensor, "256 8"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Pattern and signs of the nearest codeword of each vector: exact, whatever the vector.

    A shift at a time, the best signs of a pattern are those of the vector; where their number has the wrong parity,
    the coordinate that costs least, the first of equals, is turned.  Of equally near codewords, the first pattern, and
    +¼ before -¼.
    """
    found = [_nearest(part, table) for part in x.split(_CHUNK)] or [(x.new_zeros(0, dtype=torch.long),) * 2]
    return torch.cat([pattern for pattern, _ in found]), torch.cat([signs for _, signs in found])


def nearest_cut(x: F32[Tensor, "n 8"], real: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Pattern and signs of the codeword whose first `real` coordinates are nearest, the first of equals.

    Padding is dropped by the decoder.  Were it compared, a result could be nearer to another codeword than its own.
    """
    both = torch.arange(1 << 16, device=x.device)
    table = codewords(both >> 8, both & 255)[:, :real].double()
    step = max((1 << 20) // table.numel(), 1)
    parts = [(part[:, None, :real].double() - table).square().sum(2).argmin(1) for part in x.split(step)]
    found = torch.cat(parts)
    return found >> 8, found & 255


def _nearest(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    table = table.to(x)
    parity = table.sum(1).long() % 2
    scores, turned = [], []
    for shift in (0.25, -0.25):
        y = x - shift
        size = y.abs()
        wrong = ((y < 0).sum(1, keepdim=True) + parity) % 2
        costs = torch.stack([size[:, i : i + 1] * table[:, i] for i in range(8)])  # (8, n, 256)
        cost, place = costs.min(0)
        score = (2 * size) @ table.T - table.square().sum(1) - 4 * wrong * cost
        scores.append(score - (y.square().sum(1, keepdim=True)))
        turned.append(torch.where(wrong > 0, place, 8))
    best = torch.stack(scores, 2).flatten(1).argmax(1)  # pattern 0 +, pattern 0 -, pattern 1 +, …
    pattern, shifted = best // 2, best % 2
    place = torch.stack(turned, 2).flatten(1).gather(1, best[:, None])
    negative = (x - (0.25 - 0.5 * shifted[:, None]) < 0) ^ (torch.arange(8, device=x.device) == place)
    powers = 1 << torch.arange(7, device=x.device)
    return pattern, (negative[:, :7] * powers).sum(1) + 128 * shifted
