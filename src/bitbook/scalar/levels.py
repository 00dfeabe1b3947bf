"""Two and three levels: binary and ternary weights, one scale per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.quantizer import Child, FitOptions, Quantizer, StraightThrough, StreamSpec
from bitbook.scalar.leaves import Float
from bitbook.scalar.uniform import SMALLEST_SCALE, extremes, masked, part_of_levels


@dataclass(frozen=True, repr=False)
class Binary(Quantizer):
    """Signs: `ŵ = s` where `w ≥ 0`, else `-s`; 2 symbols.

    The range is a fit option, and decides the gradient with it: "mean" (the default) `s = mean|w|`
    (Rastegari et al. 2016, eq. 6) passes the gradient clipped to [-1, 1]; "minmax" `s = (max - min) / 2`
    passes the gradient where `|w| ≤ s`.
    """

    block: Block = WHOLE
    scale: Quantizer = Float()
    pad: bool = False

    def __post_init__(self) -> None:
        check_block(self.block)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return (StreamSpec("codes", (grid.rows, grid.cols), 2),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return {"scale": Child(self.scale, (grid.R, grid.C))}

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        lo = hi = mean_abs = w.new_zeros(())
        if options.range in (None, "mean"):
            mean_abs = grid.mean(w.abs())
        else:
            lo, hi = extremes(w, grid)
        return self.from_range(lo, hi, mean_abs, options)

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        return self.fit(w, options=options)

    def from_range(self, lo: Tensor, hi: Tensor, mean_abs: Tensor, options: FitOptions) -> dict[str, Tensor]:
        """Scale from each block's minimum, maximum and mean absolute value."""
        rule = options.range or "mean"
        if rule == "mean":
            scale = mean_abs
        elif rule == "minmax":
            scale = (hi - lo) / 2
        elif rule == "absmax":
            scale = torch.maximum(-lo, hi)
        else:
            raise PlanError(f"range={rule!r} does not fit {self!r}; use mean, minmax or absmax")
        return {"scale": scale.clamp_min(SMALLEST_SCALE)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        return {"codes": (w >= 0).to(torch.uint8).reshape(grid.rows, grid.cols)}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        signs = grid.tiles(codes["codes"].float() * 2 - 1)
        return grid.untile(signs * side["scale"][:, None, :, None], shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        return part_of_levels(self, self.block, shape, side, start, stop)

    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        clipped = options.range in (None, "mean")
        if side["scale"].numel() == 1:
            return _FakeBinary.apply(w, side["scale"].view(()), clipped)
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        tiles = _FakeBinary.apply(grid.tiles(w), side["scale"][:, None, :, None], clipped)
        return grid.untile(tiles, tuple(w.shape))


class _FakeBinary(torch.autograd.Function):
    """Signs of `w` times `scale` (a scalar, or `(R, 1, C, 1)` beside tiles), with either rule's gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, clipped: bool) -> Tensor:
        ctx.save_for_backward(w, scale)
        ctx.clipped = clipped
        positive = torch.ge(w, 0, out=torch.empty_like(w))  # as floats, see _above
        return positive.mul_(2 * scale).sub_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        w, scale = ctx.saved_tensors
        grad_scale = None
        if ctx.needs_input_grad[1]:
            blocks = (1, 3) if scale.dim() else ()
            grad_scale = torch.copysign(grad, grad * (w + 0.0)).sum(blocks, keepdim=True).reshape(scale.shape)
        return grad.clamp(-1, 1) if ctx.clipped else masked(grad, w, scale, -1, 1), grad_scale, None


@dataclass(frozen=True, repr=False)
class Ternary(Quantizer):
    """Three levels: the nearest of `-s, 0, s`; 3 symbols.

    The scale starts from ternary weight networks, `Δ = 0.7 · mean|w|`, `s = mean(|w| : |w| > Δ)`
    (Li & Liu 2016, eq. 5 and 6), and takes a few steps of Lloyd's iteration, `Δ = s / 2`.
    """

    block: Block = WHOLE
    scale: Quantizer = Float()
    pad: bool = False

    def __post_init__(self) -> None:
        check_block(self.block)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return (StreamSpec("codes", (grid.rows, grid.cols), 3, centre=1),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return {"scale": Child(self.scale, (grid.R, grid.C))}

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        if options.range not in (None, "absmax"):  # absmax: as a side tensor's quantizer
            raise PlanError(f"range={options.range!r} does not fit {self!r}, which has one rule: leave it out")
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        size = grid.tiles(w.abs(), "zero")
        threshold = 0.7 * grid.mean(w.abs())[:, None, :, None]
        scale = torch.zeros_like(threshold)
        for _ in range(4):
            large = _above(size, threshold)
            if importance is not None:
                large *= grid.tiles(importance, "zero")
            total = large.sum((1, 3), keepdim=True)
            mean = (size * large).sum((1, 3), keepdim=True) / total.clamp_min(1e-30)
            scale = torch.where(total > 0, mean, scale)
            threshold = scale / 2
        return {"scale": scale[:, 0, :, 0].clamp_min(SMALLEST_SCALE)}

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        return self.fit(w, options=options)

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        levels = _nearest(grid.tiles(w), side["scale"][:, None, :, None])
        return {"codes": grid.untile(levels + 1, (grid.rows, grid.cols)).to(torch.uint8)}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        levels = grid.tiles(codes["codes"].float() - 1)
        return grid.untile(levels * side["scale"][:, None, :, None], shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        return part_of_levels(self, self.block, shape, side, start, stop)

    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        scale = side["scale"][:, None, :, None]
        levels = _nearest(grid.tiles(w), scale)  # never as codes, which costs as much as all else
        return StraightThrough.apply(w, grid.untile(levels * scale, tuple(w.shape)))


def _nearest(tiles: Tensor, scale: Tensor) -> Tensor:
    """-1, 0 or 1, whichever times `scale` is nearest; 0 in the middle between two."""
    half = scale.detach() / 2
    return _above(tiles, half).sub_(_above(-tiles, half))


def _above(w: Tensor, threshold: Tensor) -> Tensor:
    """1 where `w > threshold`, else 0, as floats: CPUs are several times slower at booleans."""
    return torch.gt(w.detach(), threshold, out=torch.empty_like(w))
