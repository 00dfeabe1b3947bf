"""Vectors of neighbours in a row, and the scale that each takes from its block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitbook.blocks import Block, Grid, Shape
from bitbook.errors import PlanError


@dataclass(frozen=True)
class Vectors:
    """`grid` cuts the matrix into vectors `(1, d)`, `blocks` into what shares a scale."""

    grid: Grid
    blocks: Grid

    @classmethod
    def of(cls, shape: Shape, size: int, block: Block, *, pad: bool) -> Vectors:
        """Raises `PlanError` where vectors of `size` do not divide the rows, or cross the blocks' edges."""
        vectors = cls(Grid.of(shape, (1, size), pad=pad), Grid.of(shape, block, pad=pad))
        if vectors.blocks.C > 1 and vectors.blocks.c % size:
            width = vectors.blocks.c
            raise PlanError(f"blocks of {width} columns cut vectors of {size}; use a multiple of {size}, or -1")
        return vectors

    def scales(self, scale: Float[Tensor, "R C"]) -> Float[Tensor, "vectors 1"]:
        """The scale of each vector, in reading order."""
        rows = torch.arange(self.grid.R, device=scale.device) // self.blocks.r
        cols = torch.arange(self.grid.C, device=scale.device) * self.grid.c // self.blocks.c
        return scale[rows[:, None], cols].reshape(-1, 1)

    def in_steps(self, w: Tensor, scale: Float[Tensor, "R C"]) -> Tensor:
        """The vectors divided by their scales in float64; a scale of zero (or below) is a zero block."""
        steps = self.scales(scale).double()
        return self.grid.split(w).double() / steps.masked_fill(steps <= 0, torch.inf)

    def in_weights(self, points: Tensor, scale: Float[Tensor, "R C"], shape: Shape) -> Tensor:
        """Points, `(vectors, d)` in float64, times their scales, rounded to float32 once."""
        return self.grid.join((points * self.scales(scale).double()).float(), shape)

    def rms(self, w: Tensor) -> Float[Tensor, "R C"]:
        """Root mean square of each block."""
        return self.blocks.mean(w.square()).sqrt()


def least(errors: Callable[[float], Tensor], shares: list[float]) -> Tensor:
    """For each block the share with the least error, the first of equals; `errors` gives those of all, `(R, C)`."""
    best = torch.stack([errors(share) for share in shares]).argmin(0)
    return torch.tensor(shares)[best]
