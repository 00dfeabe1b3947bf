"""Scalar recipes: every weight is a level of one table, times a scale that a block shares.

    ŵ = (levels[code] + offset) · scale            code: a field of 1 to 8 bits

`Uniform` and its relatives, tables, trellises and codebooks of scalars all come to this; so one set of loops unpacks
them in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Tensor

from bitbook.blocks import Grid
from bitbook.quantizer import Quantized, Quantizer, StreamSpec
from bitbook.runtime import native
from bitbook.runtime.loops import LANES, loops
from bitbook.runtime.packed import Packed
from bitbook.runtime.packing import PackedCodes, Unit
from bitbook.runtime.products import Product, native_product
from bitbook.scalar.ecsq import ECSQ, point_values
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.table import PowersOfTwo, Table
from bitbook.scalar.uniform import Uniform
from bitbook.transforms.row_scaled import RowScaled
from bitbook.trellis import tcq, trellis
from bitbook.trellis.tcq import TCQ
from bitbook.trellis.trellis import Trellis
from bitbook.vector.codebook import Codebook

_MOST_BITS = 8
_FEWEST_ROWS = LANES // 2
"""With fewer, most lanes would be padding."""
_MOST_LOOKED_UP = 32
"""Levels of a table that vector registers hold; beyond, only evenly spaced ones are computed fast."""


@dataclass(frozen=True)
class Scalar:
    """A tensor as levels: what a recipe's codes and side tensors come to."""

    codes: Int[Tensor, "rows cols"]
    first: int
    """The smallest code there can be, whose level comes first."""
    levels: F32[Tensor, " levels"]
    scale: F32[Tensor, "R C"]
    offset: F32[Tensor, "R C"] | None
    grid: Grid


class Levels(Packed):
    """A scalar recipe: codes, a table of levels, scales (and offsets) of blocks."""

    how = "unpacked in registers"
    levels: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, quantized: Quantized, scalar: Scalar) -> None:
        super().__init__(quantized.recipe, quantized.shape)
        spec = StreamSpec("codes", (self.rows, self.cols), len(scalar.levels))
        codes = scalar.codes
        if scalar.first:
            codes = (codes.int() - scalar.first).to(torch.uint8)
        self.codes = PackedCodes(codes, spec, fold=False)
        self.block = scalar.grid.r, scalar.grid.c
        self.register_buffer("levels", scalar.levels.clone())
        self.register_buffer("scale", narrow(scalar.scale))
        self.register_buffer("offset", None if scalar.offset is None else narrow(scalar.offset))
        counted = torch.arange(len(self.levels), device=self.levels.device)
        self.even = bool(torch.equal(self.levels, self.levels[0] + counted))
        """Whether levels are whole numbers, one after the other."""

    @classmethod
    def of(cls, quantized: Quantized) -> Levels | None:
        """The tensor in this form; None where its blocks or codes do not fit into it."""
        make = SCALARS.get(type(quantized.recipe))
        scalar = None if make is None else make(quantized)
        if scalar is None or len(scalar.levels) > 1 << _MOST_BITS or len(scalar.codes) < _FEWEST_ROWS:
            return None
        grid, bits = scalar.grid, max((len(scalar.levels) - 1).bit_length(), 1)
        if grid.C > 1 and (grid.c % Unit.of(bits).codes or grid.r > 1):
            return None  # scales would change within what an instruction serves
        return cls(quantized, scalar)

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        return self._decoded(self.codes.unpack(start, stop), torch.arange(start, stop, device=self.scale.device))

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        return self._decoded(self.codes.select(index), index)

    def _product(self) -> Product | None:
        return self._native() or self._compiled()

    def _native(self) -> Product | None:
        """The product by native.c."""
        library, bits = native.compiled(), self.codes.bits
        if library is None or not self.scale.is_cpu or not (self.even or bits <= 5):
            return None
        table = None
        if bits <= 5:
            table = self.levels.new_zeros(1 << bits)
            table[: len(self.levels)] = self.levels
            table = table.repeat(_MOST_LOOKED_UP >> bits).contiguous()
        structure = native.Levels(
            self.codes.words.data_ptr(),
            None if table is None else table.data_ptr(),
            self.scale.data_ptr(),
            None if self.offset is None else self.offset.data_ptr(),
            self.rows,
            self.cols,
            *self.block,
            bits,
            int(self.levels[0]) if self.even else 0,
            _type(self.scale),
            native.FLOAT32 if self.offset is None else _type(self.offset),
        )
        kept = self.codes.words, self.scale, self.offset, table
        return native_product(library.levels_linear, structure, kept, self.rows, self.rows * self.cols)

    def _compiled(self) -> Product | None:
        """The product by numba."""
        compiled = loops()
        if compiled is None or not self.scale.is_cpu:
            return None
        offset = torch.zeros_like(self.scale) if self.offset is None else self.offset
        levels, scales, offsets = (values.float().numpy() for values in (self.levels, self.scale, offset))
        words = self.codes.words.numpy().view("uint32")

        def linear(x: Tensor, bias: Tensor | None) -> Tensor:
            y = torch.zeros(len(x), self.rows)
            form = words, levels, scales, offsets, *self.block, self.codes.bits
            compiled.levels_linear(*form, self.rows, x.numpy(), y.numpy())
            return y if bias is None else y.add_(bias)

        return linear

    def _decoded(self, codes: Tensor, rows: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        value = self.levels[codes.int()]
        blocks = rows // self.block[0]
        for part, apply in ((self.offset, torch.Tensor.add_), (self.scale, torch.Tensor.mul_)):
            if part is not None:
                own = part[blocks].float()
                wide = own if own.shape[1] == 1 else own.repeat_interleave(self.block[1], 1)[:, : self.cols]
                apply(value, wide)
        return value


def narrow(values: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing, otherwise float32."""
    half = values.bfloat16()
    return half.contiguous() if torch.equal(half.float(), values) else values.float().contiguous()


def _type(values: Tensor) -> int:
    return native.BFLOAT16 if values.dtype == torch.bfloat16 else native.FLOAT32


def _one(device: torch.device) -> Tensor:
    return torch.ones(1, 1, device=device)


def _grid(quantized: Quantized, block: tuple[int, int]) -> Grid:
    return Grid.of(quantized.shape, block, pad=True)


def _with_scale(quantized: Quantized, levels: Tensor, offset: Tensor | None = None) -> Scalar:
    recipe: Any = quantized.recipe
    scale = quantized.side["scale"].decode()
    return Scalar(quantized.codes["codes"], 0, levels.to(scale.device), scale, offset, _grid(quantized, recipe.block))


def _uniform(quantized: Quantized) -> Scalar:
    recipe = quantized.recipe
    assert isinstance(recipe, Uniform)
    levels = torch.arange(recipe.alphabet).float()
    if recipe.symmetric:
        return _with_scale(quantized, levels - recipe.q_max)
    return _with_scale(quantized, levels, -quantized.side["zero_point"].decode())


def _table(quantized: Quantized) -> Scalar:
    recipe = quantized.recipe
    assert isinstance(recipe, Table | PowersOfTwo)
    return _with_scale(quantized, torch.tensor(recipe.table))


def _ecsq(quantized: Quantized) -> Scalar | None:
    """With one step per block its multiples; with several points those of the whole tensor."""
    recipe = quantized.recipe
    assert isinstance(recipe, ECSQ)
    codes, points = quantized.codes["codes"], quantized.side["points"].decode()
    grid = _grid(quantized, recipe.block)
    counted = _counted(codes)
    if counted is None:
        return None
    if recipe.size == 1:
        scale = points.reshape(grid.R, grid.C)
        return Scalar(codes, int(counted[0]), counted.float(), scale, None, grid)
    if len(points) > 1:
        return None
    size = point_values(counted.abs()[None], points)[0]
    levels = torch.where(counted < 0, -size, size)
    return Scalar(codes, int(counted[0]), levels, _one(codes.device), None, _grid(quantized, (-1, -1)))


def _trellis(quantized: Quantized) -> Scalar | None:
    recipe = quantized.recipe
    assert isinstance(recipe, Trellis)
    codes = quantized.codes["codes"].T.contiguous()
    counted = _counted(codes)
    if counted is None:
        return None
    points = quantized.side["points"].decode() if recipe.size else None
    levels = trellis.level_values(counted, points)
    return Scalar(codes, int(counted[0]), levels, quantized.side["step"].decode(), None, _grid(quantized, recipe.block))


def _tcq(quantized: Quantized) -> Scalar | None:
    """The levels that the path goes through: a bit more than the codes, whose meaning depends on those before."""
    recipe = quantized.recipe
    assert isinstance(recipe, TCQ)
    points = quantized.side["points"].decode()
    if len(points) > 1:
        return None
    codes = recipe.levels(quantized.codes["codes"]).T.contiguous().int()
    return Scalar(codes, 0, tcq.level_values(points)[0], _one(points.device), None, _grid(quantized, (-1, -1)))


def _scalar_codebook(quantized: Quantized) -> Scalar | None:
    grid = _grid(quantized, quantized.recipe.block)  # type: ignore[attr-defined]
    centroids = quantized.side["centroids"].decode()
    if (grid.r, grid.c) != (1, 1) or len(centroids) > _MOST_LOOKED_UP:
        return None
    codes = quantized.codes["codes"]
    return Scalar(codes, 0, centroids[:, 0], _one(centroids.device), None, _grid(quantized, (-1, -1)))


def _row_scaled(quantized: Quantized) -> Scalar | None:
    """The inner recipe's levels, with the factors of the rows taken into its scales."""
    recipe = quantized.recipe
    assert isinstance(recipe, RowScaled)
    make = SCALARS.get(type(recipe.inner))
    inner = {name: side for name, side in quantized.side.items() if name not in recipe.own}
    scalar = None if make is None else make(Quantized(recipe.inner, quantized.shape, quantized.codes, inner))
    if scalar is None or len(scalar.codes) != quantized.shape[0]:
        return None
    factors = recipe.row_factors({"rows": quantized.side["rows"].decode()})[:, None]
    grid = scalar.grid
    by_row = torch.arange(grid.rows, device=factors.device) // grid.r
    offset = None if scalar.offset is None else scalar.offset[by_row]
    return replace(scalar, scale=scalar.scale[by_row] * factors, offset=offset, grid=replace(grid, r=1))


def _counted(codes: Tensor) -> Int[Tensor, " levels"] | None:
    """All whole numbers from the least code to the largest; None where these are many."""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= 1 << _MOST_BITS:
        return None
    return torch.arange(low, high + 1, dtype=torch.int32, device=codes.device)


SCALARS: Mapping[type[Quantizer], Callable[[Quantized], Scalar | None]] = {
    Uniform: _uniform,
    Binary: lambda quantized: _with_scale(quantized, torch.tensor([-1.0, 1.0])),
    Ternary: lambda quantized: _with_scale(quantized, torch.tensor([-1.0, 0.0, 1.0])),
    Table: _table,
    PowersOfTwo: _table,
    ECSQ: _ecsq,
    Trellis: _trellis,
    TCQ: _tcq,
    Codebook: _scalar_codebook,
    RowScaled: _row_scaled,
}
"""How tensors of each recipe become levels; None where one does not."""
