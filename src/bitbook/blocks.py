"""Blocks: the one rule by which tensors of any rank fall into channels, groups and vectors.

    (o, i, h, w) ──view──► rows × cols = (o, i·h·w) ──tiles──► (R, r, C, c) ──split──► (R·C, r·c)

A tensor is read as a matrix: the first axis gives the rows, all others the columns; a vector is one
row.  A block is `(r, c)` elements of that matrix, and -1 stands for the whole extent: `(-1, -1)` is the
tensor, `(1, -1)` a row (an output channel), `(-1, 1)` a column, `(1, 32)` a group, `(1, 4)` a vector.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

from bitbook.errors import PlanError

Shape = tuple[int, ...]
Block = tuple[int, int]
WHOLE: Block = (-1, -1)


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor of any rank: `(o, i, h, w)` → `(o, i·h·w)`, `(n,)` → `(1, n)`."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def check_block(block: Block) -> None:
    """Raise `PlanError` unless `block` is two integers, each positive or -1."""
    valid = isinstance(block, tuple) and len(block) == 2
    if not valid or any(type(n) is not int or (n < 1 and n != -1) for n in block):
        raise PlanError(f"block={block!r}: use (rows, cols), each a positive integer or -1 for the whole extent")


@dataclass(frozen=True)
class Grid:
    """A `rows × cols` matrix cut into `R × C` blocks of `r × c`, the last ones padded where allowed."""

    rows: int
    cols: int
    r: int
    c: int

    @classmethod
    @functools.cache  # asked for in every training step
    def of(cls, shape: Shape, block: Block, *, pad: bool = False) -> Grid:
        """The grid of `block` over a tensor of `shape`; raises `PlanError` where it does not divide."""
        rows, cols = matrix_shape(shape)
        r, c = (max(extent, 1) if size == -1 else size for size, extent in zip(block, (rows, cols), strict=True))
        if not pad:
            for extent, size, what in ((rows, r, "rows"), (cols, c, "columns")):
                if extent % size:
                    raise PlanError(
                        f"{extent} {what} do not divide into blocks of {size}; "
                        f"use {_nearby_divisors(extent, size)}, or pad=True"
                    )
        return cls(rows, cols, r, c)

    @functools.cached_property
    def R(self) -> int:  # the letters of the picture above
        """Blocks from top to bottom."""
        return math.ceil(self.rows / self.r)

    @functools.cached_property
    def C(self) -> int:
        """Blocks from left to right."""
        return math.ceil(self.cols / self.c)

    @functools.cached_property
    def padded(self) -> bool:
        """Whether the last blocks reach beyond the matrix."""
        return self.R * self.r != self.rows or self.C * self.c != self.cols

    def tiles(self, w: Tensor, fill: Literal["edge", "zero"] = "edge") -> Shaped[Tensor, "R r C c"]:
        """View `w` as tiles, so that a per-block tensor `(R, 1, C, 1)` broadcasts against them.

        Padding repeats the last row and column ("edge", which leaves minimum and maximum of a block
        alone) or is zero (which leaves sums alone).
        """
        w = w.reshape(self.rows, self.cols)
        if self.padded:
            margin = (0, self.C * self.c - self.cols, 0, self.R * self.r - self.rows)
            w = F.pad(w[None], margin, mode="replicate")[0] if fill == "edge" and w.numel() else F.pad(w, margin)
        return w.reshape(self.R, self.r, self.C, self.c)

    def untile(self, tiles: Shaped[Tensor, "R r C c"], shape: Shape) -> Tensor:
        """Undo `tiles`: drop the padding and restore `shape`."""
        w = tiles.reshape(self.R * self.r, self.C * self.c)
        return (w[: self.rows, : self.cols] if self.padded else w).reshape(shape)

    def split(self, w: Tensor) -> Shaped[Tensor, "blocks size"]:
        """One row per block, blocks in reading order, padding zero."""
        if self.r == 1 or self.C == 1:  # already in reading order: a view
            return self.tiles(w, "zero").reshape(self.R * self.C, self.r * self.c)
        return self.tiles(w, "zero").transpose(1, 2).reshape(self.R * self.C, self.r * self.c)

    def join(self, blocks: Shaped[Tensor, "blocks size"], shape: Shape) -> Tensor:
        """Undo `split`."""
        if self.r == 1 or self.C == 1:
            return self.untile(blocks.reshape(self.R, self.r, self.C, self.c), shape)
        tiles = blocks.reshape(self.R, self.C, self.r, self.c).transpose(1, 2)  # (R, r, C, c)
        return self.untile(tiles, shape)

    def columns(self, values: Shaped[Tensor, "R C *rest"], start: int, stop: int) -> Shaped[Tensor, "R c *rest"]:
        """Values of blocks as values of the columns from `start` to `stop`, each a column of blocks of its own."""
        if self.C == 1 and stop - start == 1:
            return values
        return values[:, torch.arange(start, stop, device=values.device) // self.c]

    def mean(self, w: Tensor) -> Shaped[Tensor, "R C"]:
        """The mean over each block's real (unpadded) elements."""
        if not self.padded:
            return self.tiles(w).mean((1, 3))
        return self.tiles(w, "zero").sum((1, 3)) / self._counts(w)

    def _counts(self, like: Tensor) -> Shaped[Tensor, "R C"]:
        """How many real elements each block holds, in `like`'s dtype and device."""
        heights = like.new_tensor([min(self.r, self.rows - i * self.r) for i in range(self.R)])
        widths = like.new_tensor([min(self.c, self.cols - j * self.c) for j in range(self.C)])
        return heights[:, None] * widths[None, :]


def _nearby_divisors(extent: int, size: int) -> str:
    """The divisors of `extent` nearest to `size`, in words: "28, 49 or 56"."""
    small = [d for d in range(1, math.isqrt(extent) + 1) if extent % d == 0]
    divisors = {*small, *(extent // d for d in small)}
    nearest = sorted(sorted(divisors, key=lambda d: abs(math.log(d / size)))[:3])
    return " or ".join(filter(None, [", ".join(map(str, nearest[:-1])), str(nearest[-1])]))
