"""Lattice quantization: vectors at the points of D4 or E8, whose coordinates an entropy coder makes cheap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Shape, check_block
from bitbook.errors import PlanError
from bitbook.lattice.points import nearest
from bitbook.lattice.vectors import Vectors
from bitbook.quantizer import Child, FitOptions, Quantizer, StreamSpec, code_dtype
from bitbook.scalar.leaves import Float
from bitbook.scalar.uniform import SMALLEST_SCALE

_SIZE = {"D4": 4, "E8": 8}
_RMS_PER_STEP = {"D4": 0.5 / 2**0.25, "E8": 0.5}  # the cells of ECSQ's first step: that of D4 has volume 2


@dataclass(frozen=True, repr=False)
class Lattice(Quantizer):
    """Vectors of neighbours in a row become the nearest lattice point: `ŵ = s · p` (Conway & Sloane 1982).

    "D4": four integers with an even sum.  "E8": eight of them, or those plus ½.  Their cells are rounder than cubes, so
    that the mean squared error at high rate is .37 dB and .65 dB below that of entropy-coded scalars.  On Laplacian
    weights below about 1.5 bits scalars are better.  The elements of a `block` share a scale.

    Codes are signed integers without a bound, and nothing is paid for the parity: the last coordinate is stored halved,
    rounded down, since its lowest bit follows from the others.  E8 has a stream that says which vectors are plus ½.
    Down each column, coordinates of vectors without ½ come first, and halved ones by their lowest bit: a decoder knows
    which those are, and an adaptive coder finds them together, each kind with its own frequencies.

    The step is a fit option, `step`; by default the cells have the volume of `ECSQ`'s, (rms / 2)^d.
    """

    kind: Literal["D4", "E8"] = "E8"
    block: Block = WHOLE
    scale: Quantizer = Float("bfloat16")
    pad: bool = False

    learns_side = True
    codes_by_row = False

    def __post_init__(self) -> None:
        if self.kind not in _SIZE:
            raise PlanError(f"Lattice(kind={self.kind!r}): use 'D4' or 'E8'")
        check_block(self.block)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = self._vectors(shape).grid
        free, last = (grid.R, (grid.c - 1) * grid.C), (grid.R, grid.C)
        coset = (StreamSpec("coset", last, 2),) if self.kind == "E8" else ()
        return (*coset, StreamSpec("free", free, None), StreamSpec("last", last, None))

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
        vectors = self._vectors(tuple(w.shape))
        if options.step is not None:
            return {"scale": torch.full((vectors.blocks.R, vectors.blocks.C), options.step)}
        return {"scale": (_RMS_PER_STEP[self.kind] * vectors.rms(w)).clamp_min(SMALLEST_SCALE)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        vectors = self._vectors(tuple(w.shape))
        rows, cols, size = vectors.grid.R, vectors.grid.C, vectors.grid.c
        points = nearest(self.kind, vectors.in_steps(w, side["scale"])).reshape(rows, cols, size)
        coset = (points[:, :, 0].remainder(1) > 0).to(code_dtype(2))
        whole = points.floor().to(code_dtype(None))
        free, last = whole[:, :, :-1], whole[:, :, -1:] >> 1
        codes = {"coset": coset} if self.kind == "E8" else {}
        codes["free"] = _sorted(free, coset).reshape(rows, -1)
        codes["last"] = _sorted(last, _kind_of_last(coset, free)).reshape(rows, cols)
        return codes

    def columns(self, shape: Shape) -> int:
        return self._vectors(shape).grid.c

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        vectors = self._vectors(shape)
        scale = side["scale"][:, start // vectors.blocks.c, None]
        return replace(self, block=(self.block[0], -1)), {"scale": scale}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        vectors = self._vectors(shape)
        last = codes["last"][:, :, None]
        coset = codes["coset"] if self.kind == "E8" else torch.zeros_like(codes["last"])
        free = _unsorted(codes["free"].reshape(*coset.shape, vectors.grid.c - 1), coset)
        kind = _kind_of_last(coset, free)
        last = 2 * _unsorted(last, kind).double() + (kind & 1)[:, :, None]
        points = torch.cat([free.double(), last], 2) + 0.5 * coset[:, :, None]
        return vectors.in_weights(points.reshape(-1, vectors.grid.c), side["scale"], shape)

    def _vectors(self, shape: Shape) -> Vectors:
        return Vectors.of(shape, _SIZE[self.kind], self.block, pad=self.pad)


def _kind_of_last(coset: Int[Tensor, "R C"], free: Int[Tensor, "R C d"]) -> Int[Tensor, "R C"]:
    """What decides how a last coordinate is distributed: its lowest bit, the parity of the others, and the coset."""
    return 2 * coset.long() + free.sum(2) % 2


def _sorted(codes: Int[Tensor, "R C d"], kind: Int[Tensor, "R C"]) -> Int[Tensor, "R C d"]:
    """Each column of vectors by kind, equals as they come."""
    return codes.gather(0, _order(kind, codes))


def _unsorted(codes: Int[Tensor, "R C d"], kind: Int[Tensor, "R C"]) -> Int[Tensor, "R C d"]:
    """Undo `_sorted`."""
    return torch.empty_like(codes).scatter(0, _order(kind, codes), codes)


def _order(kind: Int[Tensor, "R C"], codes: Int[Tensor, "R C d"]) -> Int[Tensor, "R C d"]:
    return kind.sort(dim=0, stable=True).indices[:, :, None].expand(codes.shape)
