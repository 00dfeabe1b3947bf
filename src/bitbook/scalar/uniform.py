"""Uniform quantization: equally spaced levels, one scale (and zero point) per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.feedback.columns import Feedback
from bitbook.quantizer import Child, FitOptions, Price, Quantizer, Range, StreamSpec, code_dtype
from bitbook.scalar import kernels
from bitbook.scalar.leaves import Float, Integer
from bitbook.scalar.priced import cheapest
from bitbook.scalar.sweep import Sweep

SMALLEST_SCALE = 1e-8
"""Floor of every fitted scale: a constant tensor has no range to divide by."""

_RANGES: tuple[Range, ...] = ("minmax", "absmax", "mse", "lsq")
_SHRINK = torch.linspace(0.2, 1.0, 81)  # share of the absmax range that the mse rule tries


@dataclass(frozen=True, repr=False)
class Uniform(Quantizer):
    """Uniform levels at `bits` bits, `block` elements sharing a scale.

    Symmetric: `q = 2^(bits-1) - 1`, `ŵ = s · clip(round(w / s), -q, q)`: 2^bits - 1 symbols, zero included.
    Otherwise: `ŵ = s · (clip(round(w / s) + z, 0, 2^bits - 1) - z)` with an integer zero point z
    (Jacob et al. 2018, eq. 1).

    The range is a fit option: "minmax" `s = (max - min) / 2q` (the default), "absmax" `s = max|w| / q`,
    "mse" the share of the absmax range with the least squared error, "lsq" `s = 2·mean|w| / √q` (the
    starting point of Esser et al. 2020).
    """

    bits: int
    block: Block = WHOLE
    symmetric: bool = True
    scale: Quantizer = Float()
    pad: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise PlanError(f"Uniform(bits={self.bits!r}): use a whole number of bits from 1 to 8")
        if self.bits == 1 and self.symmetric:
            raise PlanError("Uniform(1) has no level but zero; use Binary(), Ternary() or symmetric=False")
        check_block(self.block)

    @property
    def q_max(self) -> int:
        """The largest code of the symmetric form."""
        return 2 ** (self.bits - 1) - 1

    @property
    def alphabet(self) -> int:
        """Number of levels."""
        return 2 * self.q_max + 1 if self.symmetric else 2**self.bits

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        centre = self.q_max if self.symmetric else 0
        return (StreamSpec("codes", (grid.rows, grid.cols), self.alphabet, centre),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        side = {"scale": Child(self.scale, (grid.R, grid.C))}
        if not self.symmetric:
            side["zero_point"] = Child(Integer(self.alphabet), (grid.R, grid.C))
        return side

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        tiles = grid.tiles(w)
        lo, hi = extremes(w, grid)
        if options.range != "mse":
            return self.from_range(lo, hi, grid.mean(w.abs()), options)
        weights = torch.ones_like(w) if importance is None else importance
        weights = grid.tiles(weights, fill="zero")
        best: dict[str, Tensor] = {}
        least = torch.full_like(lo, math.inf)
        for share in _SHRINK.tolist():
            side = self.from_range(lo * share, hi * share, lo, FitOptions(range="absmax"))
            rounded = _FakeUniform.apply(tiles, *_spread(side), *self._limits)
            error = (rounded - tiles).square().mul_(weights).sum((1, 3))
            better = error < least
            least = torch.where(better, error, least)
            best = {name: torch.where(better, new, best.get(name, new)) for name, new in side.items()}
        return best

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        if options.range == "mse":  # a search; between fits the range stands still
            return side
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        if self.symmetric and options.range in (None, "minmax") and not grid.padded and kernels.serve(w, grid.c):
            return {"scale": kernels.minmax_scale(w, grid, 2 * self.q_max, SMALLEST_SCALE)}
        lo, hi = extremes(w, grid)
        return self.from_range(lo, hi, grid.mean(w.abs()) if options.range == "lsq" else lo, options)

    def from_range(self, lo: Tensor, hi: Tensor, mean_abs: Tensor, options: FitOptions) -> dict[str, Tensor]:
        """Scale (and zero point) from each block's minimum, maximum and mean absolute value."""
        rule = options.range or "minmax"
        if rule not in _RANGES:
            raise PlanError(f"range={rule!r} does not fit {self!r}; use one of {', '.join(_RANGES)}")
        if self.symmetric:
            if rule == "minmax":
                scale = (hi - lo).div_(2 * self.q_max)
            elif rule == "lsq":
                scale = 2 * mean_abs / math.sqrt(self.q_max)
            else:
                scale = torch.maximum(-lo, hi) / self.q_max
            return {"scale": scale.clamp_min(SMALLEST_SCALE)}
        if rule == "lsq":
            raise PlanError(f"range='lsq' does not fit {self!r}; use minmax, absmax or mse, or symmetric=True")
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)  # zero is always a level
        scale = ((hi - lo) / (self.alphabet - 1)).clamp_min(SMALLEST_SCALE)
        return {"scale": scale, "zero_point": (-lo / scale).round().clamp(0, self.alphabet - 1)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        scale, zero = _spread(side)
        steps = _divide(grid.tiles(w), scale).round_()
        low, high = self._limits
        steps = steps.add_(zero if zero is not None else -low).clamp_(0, high - low)
        codes = grid.untile(steps, (grid.rows, grid.cols))
        return {"codes": codes.to(code_dtype(self.alphabet))}

    def encode_priced(
        self, w: Tensor, side: Mapping[str, Tensor], price: Price, *, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        nearest = self.encode(w, side)["codes"].int()
        zero = self.q_max
        if not self.symmetric:
            grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
            shift = grid.tiles(torch.zeros_like(w)) + side["zero_point"][:, None, :, None]
            zero = grid.untile(shift, (grid.rows, grid.cols)).int()
        signed = nearest - zero
        fewer = (0, 1, 2, self.alphabet)  # magnitudes to give up; giving up all is zero
        candidates = (torch.sign(signed) * (signed.abs() - step).clamp_min(0) + zero for step in fewer)
        return {"codes": cheapest(self, w, side, candidates, price, importance).to(code_dtype(self.alphabet))}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        scale, zero = _spread(side)
        steps = grid.tiles(codes["codes"].float()) - (self.q_max if zero is None else zero)
        return grid.untile(steps * scale, shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        return part_of_levels(self, self.block, shape, side, start, stop)

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        if not self.symmetric or not Sweep.serves(w, price):
            return super().encode_fed_back(w, side, feedback, price)
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        return feedback.encode(w, Sweep(grid, side["scale"].reshape(-1, 1), self.q_max, None, price))

    def ladder(self, side: Mapping[str, Tensor]) -> Tensor | None:
        if not self.symmetric:  # zero may be anywhere
            return None
        return side["scale"].reshape(-1, 1) * torch.arange(1, self.q_max + 1)

    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        """Straight through within the range, zero outside; to the scale as in LSQ (Esser et al. 2020, eq. 3)."""
        scale = side["scale"]
        if scale.numel() == 1:
            return _fake_uniform(w, scale, side.get("zero_point"), *self._limits)
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        return grid.untile(_FakeUniform.apply(grid.tiles(w), *_spread(side), *self._limits), tuple(w.shape))

    @property
    def _limits(self) -> tuple[int, int]:
        """Least and largest step before a zero point is taken off."""
        return (-self.q_max, self.q_max) if self.symmetric else (0, self.alphabet - 1)


def part_of_levels(
    recipe: Quantizer, block: Block, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
) -> tuple[Quantizer, Mapping[str, Tensor]]:
    """`Quantizer.part` where every side tensor is one value for each block: columns become blocks of their own."""
    grid = Grid.of(shape, block, pad=True)
    own = replace(recipe, block=(block[0], 1))  # type: ignore[call-arg]
    return own, {name: grid.columns(value, start, stop) for name, value in side.items()}


def _fake_uniform(w: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """`_FakeUniform` for one scale; where it is fixed, PyTorch's own hardtanh has its gradient at less cost."""
    if scale.requires_grad or not (kernels.serve(w) and scale.is_cpu and (s := scale.item()) > 0):
        return _FakeUniform.apply(w, scale.view(()), None if zero is None else zero.view(()), low, high)
    if zero is not None:
        shift = int(zero.item())
        low, high = low - shift, high - shift
    if w.requires_grad and torch.is_grad_enabled():
        out = F.hardtanh(w, *kernels.bounds(s, low, high))  # its gradient needs only its input
    else:
        out = torch.empty_like(w)
    return kernels.levels(w, s, low, high, out)


class _FakeUniform(torch.autograd.Function):
    """Round `w` to levels; the same arithmetic, in the same order, as encode then decode.

    `scale` and `zero` are scalars, or `(R, 1, C, 1)` beside tiles `(R, r, C, c)`.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        ctx.save_for_backward(w, scale, zero)
        ctx.low, ctx.high = low, high
        if scale.dim() and kernels.serve(w, w.shape[-1]):
            return kernels.tiled_levels(w, scale, zero, low, high)
        steps = _divide(w, scale).round_()
        if zero is not None:
            return steps.add_(zero).clamp_(low, high).sub_(zero).mul_(scale)
        return steps.clamp_(low, high).add_(0.0).mul_(scale)  # codes know no -0.0, so training sees none

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, scale, zero = ctx.saved_tensors
        low, high = (ctx.low, ctx.high) if zero is None else (ctx.low - zero, ctx.high - zero)
        grad_w = None
        graph = torch.is_grad_enabled()  # of the gradient's own gradient, which only torch's operations have
        if ctx.needs_input_grad[0] and scale.dim() and not graph and kernels.serve(w, w.shape[-1]):
            grad_w = kernels.tiled_mask(grad, w, scale, zero, ctx.low, ctx.high)
        elif ctx.needs_input_grad[0]:
            grad_w = masked(grad, w, scale, low, high)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            ratio = _divide(w, scale)
            clipped = ratio.clamp(torch.as_tensor(low), torch.as_tensor(high))
            inside = (ratio > low) & (ratio < high)
            slope = torch.where(inside, ratio.round() - ratio, clipped)
            blocks = (1, 3) if scale.dim() else ()
            per_block = w.numel() // scale.numel()
            damping = 1 / math.sqrt(per_block * max(ctx.high, 1))  # LSQ, section 2.2
            grad_scale = (grad * slope).sum(blocks, keepdim=True).reshape(scale.shape) * damping
        return grad_w, grad_scale, None, None, None


def masked(grad: Tensor, w: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """`grad` where `low · scale ≤ w ≤ high · scale`, else zero."""
    if w.is_cpu and _on_hand(scale):
        return torch.ops.aten.hardtanh_backward(grad, w, *kernels.bounds(scale.item(), float(low), float(high)))
    # A mask of floats: CPUs are several times slower at booleans.
    w, scale = w.detach(), scale.detach()
    inside = torch.ge(w, scale * low, out=torch.empty_like(w))
    inside.mul_(torch.le(w, scale * high, out=torch.empty_like(w)))
    return grad * inside


def extremes(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of `w`, `(R, C)`."""
    if grid.R == grid.C == 1:
        lo, hi = torch.aminmax(w)
        return lo.view(1, 1), hi.view(1, 1)
    tiles = grid.tiles(w)
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def _spread(side: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Side tensors `(R, C)` shaped to broadcast against tiles `(R, r, C, c)`."""
    zero = side.get("zero_point")
    return side["scale"][:, None, :, None], None if zero is None else zero[:, None, :, None]


def _on_hand(scale: Tensor) -> bool:
    """Whether one number on the CPU, which can be read at no cost; not while a compiler traces."""
    return scale.numel() == 1 and scale.is_cpu and not torch.compiler.is_compiling()


def _divide(w: Tensor, scale: Tensor) -> Tensor:
    """`w / scale`, and zero wherever a stored scale came back as zero (or below): a zero scale is a zero block."""
    if _on_hand(scale) and scale.item() > 0:
        return w / scale
    return w / scale.masked_fill(scale <= 0, math.inf)
