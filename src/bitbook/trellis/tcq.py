"""Trellis-coded quantization at a fixed rate: twice as many levels as codes, and a machine that says which half."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.feedback.columns import Feedback
from bitbook.quantizer import Child, FitOptions, Price, Quantizer, StreamSpec, code_dtype
from bitbook.scalar.leaves import Float
from bitbook.trellis.machine import SIZES
from bitbook.trellis.trellis import PathEncoder, block_numbers
from bitbook.trellis.viterbi import Costs, best_path, states_before, table_costs

_MOST_ROUNDS = 20  # of paths and levels in turn
_CLOSER = 0.8  # than a scalar quantizer's levels; so placed, 20 rounds come where 60 come from elsewhere


@dataclass(frozen=True, repr=False)
class TCQ(Quantizer):
    """Trellis-coded quantizer of `bits` a weight (Marcellin & Fischer 1990).

    There are 2^(bits + 1) levels, `±p[k]`; in each place the state of a machine leaves every other one, and the code
    chooses among those, and with its lowest bit the next state.  The path runs down each column and on to the next
    one.  Levels are fitted to the paths and stored through `points`, `2^bits` magnitudes for each block.

    At 8 states the squared error is about 1 dB below that of a scalar quantizer with as many codes.  `Trellis`, whose
    levels have no bound, is better wherever codes are entropy-coded.
    """

    bits: int
    states: int = 8
    block: Block = WHOLE
    points: Quantizer = Float("bfloat16")
    pad: bool = False

    independent_blocks = False
    codes_by_row = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 7:
            raise PlanError(f"TCQ(bits={self.bits!r}): use a whole number from 1 to 7")
        if self.states not in SIZES:
            raise PlanError(f"TCQ(states={self.states!r}): use one of {', '.join(map(str, SIZES))}")
        check_block(self.block)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = self._grid(shape)
        return (StreamSpec("codes", (grid.cols, grid.rows), 1 << self.bits),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = self._grid(shape)
        return {"points": Child(self.points, (grid.R * grid.C, 1 << self.bits))}

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        """Levels at the means of what paths put there, paths and levels in turn (Lloyd 1982)."""
        grid = self._grid(tuple(w.shape))
        count = 1 << self.bits
        rms = grid.mean(w.square()).sqrt().reshape(-1, 1)
        # First as dense as is best for Gauss at high rate, the cube root of the density (Panter & Dite 1951).
        share = 0.5 + (torch.arange(count, dtype=torch.float64) + 0.5) / (2 * count)
        spread = _CLOSER * math.sqrt(3) * torch.special.ndtri(share)
        points = rms * spread.float()
        weights = grid.split(torch.ones_like(w) if importance is None else importance).double()
        blocks = grid.split(w).double()
        best, least = points, torch.full((len(points), 1), math.inf, dtype=torch.float64)
        for _ in range(min(options.iterations, _MOST_ROUNDS) + 1):
            levels = self._split(grid, self._path(w, points, importance))
            error = (weights * (level_values(points).gather(1, levels) - blocks).square()).sum(1, keepdim=True)
            best, least = torch.where(error < least, points, best), torch.minimum(error, least)
            magnitude = torch.where(levels >= count, levels - count, count - 1 - levels)
            signed = torch.where(levels >= count, blocks, -blocks)
            total = torch.zeros(points.shape, dtype=torch.float64).scatter_add_(1, magnitude, weights)
            moved = torch.zeros_like(total).scatter_add_(1, magnitude, weights * signed)
            points = torch.where(total > 0, (moved / total.clamp_min(1e-30)).float(), points)
            points = torch.cummax(points.clamp_min(0), 1).values
        return {"points": best}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        return {"codes": (self._path(w, side["points"], importance) >> 1).to(code_dtype(1 << self.bits))}

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        if price is not None:
            return super().encode_fed_back(w, side, feedback, price)
        values = level_values(side["points"])
        block = block_numbers(self._grid(tuple(w.shape)))

        def costs(target: Tensor, weights: Tensor, column: int) -> Costs:
            in_order = target[:, 0].numpy(), weights[:, 0].numpy(), block[:, column].numpy()
            return table_costs(*in_order, values.numpy())

        def chosen(levels: Tensor, column: int) -> Tensor:
            return values[block[:, column]].gather(1, levels.long())

        encoder = PathEncoder(self.states, costs, chosen, priced=False)
        feedback.encode(w, encoder)
        return {"codes": (encoder.levels() >> 1).to(code_dtype(1 << self.bits))}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid, levels = self._grid(shape), self.levels(codes["codes"])
        return grid.join(level_values(side["points"]).gather(1, self._split(grid, levels)), shape)

    def levels(self, codes: Int[Tensor, "cols rows"]) -> Int[Tensor, "cols rows"]:
        """The level in each place, counted from the lowest."""
        chosen = codes.long()
        states = torch.from_numpy(states_before((chosen & 1).reshape(-1).cpu().numpy(), self.states))
        return 2 * chosen + (states.to(chosen.device).reshape(chosen.shape) & 1)

    def _grid(self, shape: Shape) -> Grid:
        return Grid.of(shape, self.block, pad=self.pad)

    @staticmethod
    def _split(grid: Grid, levels: Int[Tensor, "cols rows"]) -> Int[Tensor, "blocks n"]:
        return grid.split(levels.T.contiguous()).long()

    def _path(
        self, w: Tensor, points: F32[Tensor, "blocks count"], importance: Tensor | None
    ) -> Int[Tensor, "cols rows"]:
        grid = self._grid(tuple(w.shape))
        values = level_values(points.detach()).cpu().numpy()
        levels, _ = best_path(w.numel(), table_costs(*_in_path_order(w, importance, grid), values), self.states)
        return torch.from_numpy(levels).reshape(grid.cols, grid.rows).to(w.device)


def level_values(points: F32[Tensor, "blocks count"]) -> F32[Tensor, "blocks levels"]:
    """All levels from the lowest to the highest."""
    return torch.cat([-points.flip(1), points], 1)


def _in_path_order(w: Tensor, importance: Tensor | None, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, the importance of each and the number of its block, column after column."""
    weight = torch.ones_like(w) if importance is None else importance
    values = w.detach(), weight, block_numbers(grid)
    ordered = [value.reshape(grid.rows, grid.cols).T.reshape(-1).cpu().numpy() for value in values]
    return ordered[0], ordered[1], ordered[2]
