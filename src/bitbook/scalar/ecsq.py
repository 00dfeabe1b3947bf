"""Entropy-coded scalar quantization: whole numbers without a bound, for coders that make the frequent ones cheap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float as F32
from jaxtyping import Float64, Int
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.feedback.columns import Feedback
from bitbook.quantizer import LARGEST_CODE, Child, FitOptions, Price, Quantizer, StreamSpec
from bitbook.scalar import ladder
from bitbook.scalar.leaves import Float
from bitbook.scalar.priced import cheapest
from bitbook.scalar.sweep import Sweep

_RMS_PER_STEP = 0.5  # of a step that the caller does not choose
_MOST_ROUNDS = 10  # of Lloyd's iteration over the reconstruction points; it converges in a few


@dataclass(frozen=True, repr=False)
class ECSQ(Quantizer):
    """Entropy-coded scalar quantizer: signed whole numbers, each magnitude with its reconstruction point.

    `ŵ = sign(c) · p[|c|]`, with `p[0] = 0`.  The first `size` magnitudes have points of their own, ascending and
    shared by `block`; beyond them points go on at the last distance, so `size=1` is a step, `ŵ = s · c`.  A weight
    becomes the nearest point, or, under a price, the one with the least squared error plus λ · bits (Chou, Lookabaugh &
    Gray 1989).  The zone that becomes zero reaches to `dead_zone · p[1]`: beyond one half, fewer weights survive, which
    is what a price asks for (Sullivan 1996); a decoder does not need to know.

    The first step is a fit option, `step`, by default half the root mean square of the weights; with several points,
    the fit moves them to the means of what they stand for (Lloyd 1982), unless `iterations` is 0.
    """

    size: int = 1
    block: Block = WHOLE
    points: Quantizer = Float("bfloat16")
    pad: bool = False
    dead_zone: float = 0.5

    learns_side = True

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= 255:
            raise PlanError(f"ECSQ(size={self.size!r}): use a whole number of reconstruction points from 1 to 255")
        check_block(self.block)
        if not 0.5 <= self.dead_zone < 1:
            raise PlanError(f"ECSQ(dead_zone={self.dead_zone!r}): use a share of the first point from 0.5 to below 1")

    def decoder(self) -> ECSQ:
        return replace(self, dead_zone=0.5)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return (StreamSpec("codes", (grid.rows, grid.cols), None),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return {"points": Child(self.points, (grid.R * grid.C, self.size))}

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        if options.step is None:
            step = _RMS_PER_STEP * grid.mean(w.square()).sqrt().reshape(-1, 1)
        else:
            step = torch.full((grid.R * grid.C, 1), options.step)
        return self._fit_from(step, w, importance, options)

    def fit_fed_back(
        self, w: Tensor, feedback: Feedback, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        """Blocks of columns get steps in proportion to `1 / R_kk`, so that all add alike to the outputs' error.

        That is reverse waterfilling at high rate: where a bit lowers a column's error by the same amount everywhere.
        """
        shape = tuple(w.shape)
        grid = Grid.of(shape, self.block, pad=self.pad)
        if grid.C == 1:
            return super().fit_fed_back(w, feedback, options, generator)
        remaining = grid.mean(feedback.remaining(shape)).reshape(-1, 1).clamp_min(1e-12)
        if options.step is None:  # as many bits as steps for the whole would take, hence the geometric mean
            remaining = remaining / remaining.log().mean().exp()
        step = _RMS_PER_STEP * w.square().mean().sqrt() if options.step is None else options.step
        return self._fit_from(step / remaining.sqrt(), w, feedback.importance(shape), options)

    def _fit_from(
        self, step: F32[Tensor, "blocks 1"], w: Tensor, importance: Tensor | None, options: FitOptions
    ) -> dict[str, Tensor]:
        """Points from each block's step: the step's multiples, moved by Lloyd's iteration if there are several."""
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        points = step * torch.arange(1, self.size + 1)
        if self.size == 1:
            return {"points": points}
        weights = grid.split(torch.ones_like(w) if importance is None else importance).double()
        blocks = grid.split(w.abs()).double()
        best, least = points, torch.full((len(points), 1), math.inf, dtype=torch.float64)
        for _ in range(min(options.iterations, _MOST_ROUNDS) + 1):
            size = _magnitudes(blocks.float(), points, self.dead_zone)
            error = (weights * (point_values(size, points) - blocks).square()).sum(1, keepdim=True)
            best, least = torch.where(error < least, points, best), torch.minimum(error, least)
            points = centred(blocks, size, weights, points, step)
        return {"points": best}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        blocks = grid.split(w)
        size = _magnitudes(blocks.abs(), side["points"], self.dead_zone)
        return {"codes": grid.join(torch.where(blocks < 0, -size, size), (grid.rows, grid.cols))}

    def encode_priced(
        self, w: Tensor, side: Mapping[str, Tensor], price: Price, *, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        nearest = replace(self, dead_zone=0.5).encode(w, side)["codes"]
        fewer = (0, 1, 2, LARGEST_CODE)  # magnitudes to give up; giving up all is zero
        candidates = (torch.sign(nearest) * (nearest.abs() - step).clamp_min(0) for step in fewer)
        return {"codes": cheapest(self, w, side, candidates, price, importance)}

    def recentre(
        self, w: Tensor, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], *, importance: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Points at the means of what they stand for; with one point, the step of least squared error."""
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        signed = grid.split(codes["codes"])
        weights = grid.split(torch.ones_like(w) if importance is None else importance)
        return {"points": recentred(grid.split(w) * torch.sign(signed), signed.abs(), weights, side["points"])}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        signed = grid.split(codes["codes"])
        value = point_values(signed.abs(), side["points"]) * signed.sign()
        return grid.join(value, shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        grid = Grid.of(shape, self.block, pad=True)
        points = grid.columns(side["points"].reshape(grid.R, grid.C, self.size), start, stop)
        return replace(self, block=(self.block[0], 1)), {"points": points.reshape(-1, self.size)}

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        if not Sweep.serves(w, price):
            return super().encode_fed_back(w, side, feedback, price)
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        return feedback.encode(w, Sweep(grid, side["points"], None, self.dead_zone, price))

    def ladder(self, side: Mapping[str, Tensor]) -> Tensor:
        return side["points"]

    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        """Straight through to `w`; to each point, the sum over the weights it stands for."""
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        return grid.join(_FakeECSQ.apply(grid.split(w), side["points"], self.dead_zone), tuple(w.shape))


class _FakeECSQ(torch.autograd.Function):
    """Nearest points of blocks `w`, `(B, n)`; the same arithmetic as encode, then decode."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, points: Tensor, dead_zone: float) -> Tensor:
        ctx.count = points.shape[1]
        if ladder.serve(w):
            size, value = ladder.nearest(w, points, dead_zone)
        else:
            size = _magnitudes(w.abs(), points, dead_zone)
            value = point_values(size, points)
            value = torch.where((w < 0) & (size > 0), -value, value)  # codes know no -0.0
        ctx.save_for_backward(w, size)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, size = ctx.saved_tensors
        grad_points = None
        if ctx.needs_input_grad[1]:
            if ladder.serve(w):
                grad_points = ladder.points_gradient(w, size, grad, ctx.count)
            else:
                grad_points = _points_gradient(w, size, grad, ctx.count)
        return grad, grad_points, None


def _points_gradient(w: Tensor, size: Tensor, grad: Tensor, count: int) -> Tensor:
    """The sum over the weights that each point stands for, their signs undone; the tail joins the last two."""
    signed = (grad * torch.sign(w)).double()
    within = size.long().clamp_max(count)
    total = signed.new_zeros(len(w), count + 1).scatter_add_(1, within, signed)[:, 1:]
    beyond = ((size - within) * signed).sum(1)
    total[:, -1] += beyond
    if count > 1:
        total[:, -2] -= beyond
    return total.to(grad.dtype)


def _magnitudes(
    size: F32[Tensor, "blocks n"], points: F32[Tensor, "blocks points"], dead_zone: float
) -> Int[Tensor, "blocks n"]:
    """The magnitude whose point is nearest, or the smaller of two; 0 in the dead zone."""
    before = torch.cat([torch.zeros_like(points[:, :1]), points[:, :-1]], 1)
    middles = torch.cat([dead_zone * points[:, :1], (before + points)[:, 1:] / 2], 1)
    middles = torch.where(points > 0, middles, math.inf)
    found = torch.zeros(size.shape, dtype=torch.int32, device=size.device)
    for i in range(points.shape[1]):
        found += size > middles[:, i : i + 1]
    last, distance = points[:, -1:], (points - before)[:, -1:]
    steps = (size - last) / torch.where(distance > 0, distance, math.inf)
    if bool((steps > 0.5).any()):
        found += (steps - 0.5).ceil_().clamp_(0, 1 << 30).int()
    return found


def centred(
    size_w: Float64[Tensor, "blocks n"],
    size: Int[Tensor, "blocks n"],
    weights: Float64[Tensor, "blocks n"],
    points: F32[Tensor, "blocks points"],
    step: F32[Tensor, "blocks 1"],
) -> F32[Tensor, "blocks points"]:
    """Points moved to the weighted means of the magnitudes that they stand for (Lloyd 1982).

    The last stays a `step` beyond the one before: what follows it moves along.  Points without weights stay.
    """
    count = points.shape[1]
    own = weights * (size < count)
    index = size.clamp_max(count).long()
    total = torch.zeros(len(points), count + 1, dtype=torch.float64).scatter_add_(1, index, own)
    moved = torch.zeros_like(total).scatter_add_(1, index, own * size_w)
    centre = (moved / total.clamp_min(1e-30))[:, 1:].float()
    points = torch.where(total[:, 1:] > 0, centre, points)
    points[:, -1:] = points[:, -2:-1] + step
    return points


def recentred(
    size_w: F32[Tensor, "blocks n"],
    size: Int[Tensor, "blocks n"],
    weights: F32[Tensor, "blocks n"],
    points: F32[Tensor, "blocks points"],
) -> F32[Tensor, "blocks points"]:
    """Points of least squared error for given magnitudes: means, and beyond the last point the best distance.

    `size_w` are the weights times the signs of their codes.  Points stay ascending; those without weights stay.
    """
    size_w, weights = size_w.double(), weights.double()
    count = points.shape[1]
    if count > 1:
        step = points[:, -1:] - points[:, -2:-1]
        points = torch.cummax(centred(size_w, size, weights, points, step), 1).values
    before = points[:, -2:-1].double() if count > 1 else torch.zeros(len(points), 1, dtype=torch.float64)
    far = weights * (size >= count)
    steps = size.double() - (count - 1)  # of the last distance, from the point before the last
    square = (far * steps.square()).sum(1, keepdim=True)
    distance = (far * steps * (size_w - before)).sum(1, keepdim=True) / square.clamp_min(1e-30)
    last = torch.where((square > 0) & (distance > 0), before + distance, points[:, -1:].double())
    return torch.cat([points[:, :-1], last.float()], 1)


def point_values(size: Int[Tensor, "blocks n"], points: F32[Tensor, "blocks points"]) -> F32[Tensor, "blocks n"]:
    """The points of magnitudes; differentiable in the points."""
    count = points.shape[1]
    table = torch.cat([torch.zeros_like(points[:, :1]), points], 1)
    value = table.gather(1, size.clamp_max(count).long())
    if size.numel() and int(size.max()) > count:
        value = value + (size - count).clamp_min(0) * (table[:, -1:] - table[:, -2:-1])
    return value
