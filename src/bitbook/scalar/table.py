"""Levels in a table: a scale per block times one of some given numbers, such as NF4 or powers of two."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.quantizer import Child, FitOptions, Price, Quantizer, StreamSpec, code_dtype
from bitbook.scalar.leaves import Float
from bitbook.scalar.priced import cheapest
from bitbook.scalar.uniform import SMALLEST_SCALE, part_of_levels

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""NormalFloat of 4 bits (Dettmers et al. 2023, appendix E): levels of about equally many Gaussian weights, and zero."""

_SHARES = tuple(0.2 + 0.01 * i for i in range(81))  # of the absmax range, which the mse rule tries
_CLOSEST = 1e-5  # of the largest level: nearer ones are lost to the rounding of a scale's product
_MOST_LEVELS = 256


class _Levels(Quantizer):
    """What both kinds of tables share; they differ in where `table` comes from."""

    block: Block
    scale: Quantizer
    pad: bool

    @property
    def table(self) -> tuple[float, ...]:
        """The levels at a scale of one, ascending."""
        raise NotImplementedError

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return (StreamSpec("codes", (grid.rows, grid.cols), len(self.table), self._zero),)

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
        side = dict(self.refresh(w, {}, FitOptions(range="absmax")))
        if options.range in (None, "absmax"):
            return side
        if options.range != "mse":
            raise PlanError(f"range={options.range!r} does not fit {self!r}; use absmax or mse")
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        weights = grid.tiles(torch.ones_like(w) if importance is None else importance, "zero")
        largest, best = side["scale"], side["scale"]
        least = torch.full_like(best, math.inf)
        for share in _SHARES:
            tried = {"scale": (largest * share).clamp_min(SMALLEST_SCALE)}
            gap = self.decode(self.encode(w, tried), tried, tuple(w.shape)) - w
            error = (grid.tiles(gap, "zero").square() * weights).sum((1, 3))
            best = torch.where(error < least, tried["scale"], best)
            least = torch.minimum(error, least)
        return {"scale": best}

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        if options.range == "mse":  # a search; between fits the range stands still
            return side
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        tiles = grid.tiles(w)
        ends = [(tiles.amax((1, 3)), self.table[-1]), (tiles.amin((1, 3)), self.table[0])]
        ratios = [extreme / level for extreme, level in ends if level * (1 if extreme is ends[0][0] else -1) > 0]
        scale = functools.reduce(torch.maximum, ratios)
        return {"scale": scale.clamp_min(SMALLEST_SCALE)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        levels = torch.tensor(self.table, dtype=torch.float32, device=w.device)
        scale = side["scale"][:, None, :, None]
        ratio = grid.tiles(w) / scale.masked_fill(scale <= 0, math.inf)  # a zero scale is a zero block
        codes = torch.bucketize(ratio.contiguous(), (levels[1:] + levels[:-1]) / 2)
        return {"codes": grid.untile(codes, (grid.rows, grid.cols)).to(code_dtype(len(levels)))}

    def encode_priced(
        self, w: Tensor, side: Mapping[str, Tensor], price: Price, *, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        nearest = self.encode(w, side)["codes"].int() - self._zero
        fewer = (0, 1, 2, len(self.table))  # places to give up; giving up all is the level of zero
        candidates = (torch.sign(nearest) * (nearest.abs() - step).clamp_min(0) + self._zero for step in fewer)
        return {"codes": cheapest(self, w, side, candidates, price, importance).to(code_dtype(len(self.table)))}

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        return part_of_levels(self, self.block, shape, side, start, stop)

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        levels = torch.tensor(self.table, dtype=torch.float32, device=side["scale"].device)
        tiles = grid.tiles(levels[codes["codes"].long()])
        return grid.untile(tiles * side["scale"][:, None, :, None], shape)

    def ladder(self, side: Mapping[str, Tensor]) -> Tensor | None:
        table = self.table
        if len(table) % 2 == 0 or any(a != -b for a, b in zip(table, reversed(table), strict=True)):
            return None
        return side["scale"].reshape(-1, 1) * torch.tensor(table[self._zero + 1 :])

    @property
    def _zero(self) -> int:
        """The code of zero; 0 where no level is."""
        return self.table.index(0.0) if 0.0 in self.table else 0


@dataclass(frozen=True, repr=False)
class Table(_Levels):
    """Given levels: `ŵ = s · levels[c]`, a scale per block and the nearest of 2 to 256 levels, ascending.

    `Table(NF4, (1, 64))` is 4-bit NormalFloat; `Table(lloyd_max(GAUSS, 8).levels)` is Lloyd–Max for Gaussian weights.
    Levels are float32 numbers, kept as their shortest decimals.  The range is a fit option: "absmax" (the default), the
    least scale with which no weight lies outside, or "mse", the share of it with the least squared error.
    """

    levels: tuple[float, ...]
    block: Block = WHOLE
    scale: Quantizer = Float()
    pad: bool = False

    def __post_init__(self) -> None:
        check_block(self.block)
        given = self.levels
        numbers = isinstance(given, tuple) and all(type(v) in (int, float) and abs(v) <= 1e30 for v in given)
        if not numbers or not 2 <= len(given) <= _MOST_LEVELS:
            raise PlanError(f"Table(levels={given!r:.80}): use a tuple of 2 to {_MOST_LEVELS} finite numbers")
        levels = tuple(float(str(np.float32(v))) + 0.0 for v in given)
        gap = _CLOSEST * max(map(abs, levels))
        if gap == 0 or not all(b - a > gap for a, b in itertools.pairwise(levels)):
            raise PlanError(f"Table(levels={given!r:.80}): use ascending levels, apart by 1e-5 of the largest and more")
        object.__setattr__(self, "levels", levels)

    @property
    def table(self) -> tuple[float, ...]:
        return self.levels


@dataclass(frozen=True, repr=False)
class PowersOfTwo(_Levels):
    """Powers of two: `ŵ = s · c`, c one of 0, ±1, ±1/2, ±1/4, … (Zhou et al. 2017); 2^bits - 1 symbols.

    Multiplying by such a weight is a shift.  More bits add levels near zero only; sums of two powers, which spread
    them (Li et al. 2020, APoT), are a `Table`.  The range is a fit option, as for `Table`.
    """

    bits: int
    block: Block = WHOLE
    scale: Quantizer = Float()
    pad: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 5:
            raise PlanError(f"PowersOfTwo(bits={self.bits!r}): use a whole number of bits from 2 to 5")
        check_block(self.block)

    @property
    def table(self) -> tuple[float, ...]:
        positive = tuple(2.0**-k for k in reversed(range(2 ** (self.bits - 1) - 1)))
        return (*(-level for level in reversed(positive)), 0.0, *positive)
