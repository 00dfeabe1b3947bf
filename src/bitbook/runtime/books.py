"""Codebooks: products with codewords, of which every row needs some.

rows      x · centroidsᵀ, then a gather        K / rows of the multiplications, and nothing else changes
vectors   few inputs: tables of every codeword's product with each part of x, looked up and added
          many: some rows decoded at a time, then a plain product
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Tensor

from bitbook.blocks import Grid
from bitbook.quantizer import Quantized, StreamSpec
from bitbook.runtime import native
from bitbook.runtime.levels import Levels
from bitbook.runtime.loops import LANES
from bitbook.runtime.packed import Dense, Packed, Streams
from bitbook.runtime.packing import PackedCodes, threads_for
from bitbook.runtime.products import Product, is_plain, native_product
from bitbook.scalar.leaves import Float
from bitbook.vector.codebook import Codebook

MOST_LOOKED_UP = 4
MOST_PERMUTED = 48
"""Inputs up to which tables are quicker than decoding (`bench/runtime.py`); with more, rows are decoded for all.

The second is for tables of at most 16 codewords, which a register holds."""

_MOST_BITS = 16


class Rows(Packed):
    """A codebook of whole rows: centroids, in whatever form is theirs, and a label for each row."""

    how = "products with centroids"
    labels: Tensor

    def __init__(self, quantized: Quantized, centroids: Packed) -> None:
        super().__init__(quantized.recipe, quantized.shape)
        self.centroids = centroids
        self.register_buffer("labels", quantized.codes["codes"].reshape(-1).int())

    @classmethod
    def of(cls, quantized: Quantized) -> Rows | None:
        """None where a codeword is not a whole row."""
        grid = _grid(quantized)
        if grid.r != 1 or grid.C != 1:
            return None
        centroids = quantized.side["centroids"]
        if centroids.recipe == Float():
            return cls(quantized, Panels(centroids))
        if isinstance(centroids.recipe, Float):
            return cls(quantized, Dense.of(centroids))
        return cls(quantized, Levels.of(centroids) or Streams(centroids))

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        return self.centroids.select(self.labels[start:stop])

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        return self.centroids.select(self.labels[index])

    def _by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.centroids.linear(x, None).index_select(1, self.labels)
        return y if bias is None else y.add_(bias)

    def _product(self) -> Product | None:
        """By native.c: all of it where centroids are floats, otherwise what follows the centroids' own."""
        library, centroids = native.compiled(), self.centroids
        if library is None or not self.labels.is_cpu:
            return None
        panels = centroids.values if isinstance(centroids, Panels) else None
        address = None if panels is None else panels.data_ptr()
        structure = native.Rows(address, self.labels.data_ptr(), self.rows, self.cols, centroids.rows)
        kept = panels, self.labels
        if panels is not None:
            return native_product(library.rows_linear, structure, kept, self.rows, panels.numel())
        gather = native_product(library.gather_linear, structure, kept, self.rows, self.rows)
        return lambda x, bias: gather(centroids.linear(x, None), bias)


class Panels(Packed):
    """Floats in panels of 16 rows, column by column, as products read them."""

    how = "floats"
    values: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__(quantized.recipe, quantized.shape)
        padded = torch.zeros(-(-self.rows // LANES) * LANES, self.cols)
        padded[: self.rows] = quantized.decode()
        self.register_buffer("values", padded.reshape(-1, LANES, self.cols).transpose(1, 2).contiguous())

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        return self.values.transpose(1, 2).reshape(-1, self.cols)[start:stop]

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        return self.values[index // LANES, :, index % LANES]


class Vectors(Packed):
    """A codebook of parts of rows, such as vectors of four inputs: codes of 1 to 16 bits, and the codewords."""

    how = "looked up"
    codewords: Tensor
    table: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__(quantized.recipe, quantized.shape)
        codewords = quantized.side["centroids"].decode()
        spec = StreamSpec("codes", tuple(quantized.codes["codes"].shape), len(codewords))  # type: ignore[arg-type]
        self.codes = PackedCodes(quantized.codes["codes"], spec, fold=False)
        self.register_buffer("codewords", codewords)
        table = codewords.new_zeros(codewords.shape[1], -(-len(codewords) // LANES) * LANES)
        table[:, : len(codewords)] = codewords.T
        self.register_buffer("table", table)

    @classmethod
    def of(cls, quantized: Quantized) -> Vectors | None:
        """None where codewords are not parts of rows, or there are too many."""
        grid = _grid(quantized)
        codewords = quantized.side["centroids"].shape[0]
        if grid.r != 1 or grid.c == 1 or grid.padded or codewords > 1 << _MOST_BITS or grid.R < LANES // 2:
            return None
        return cls(quantized)

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        prepared = self._native()
        if prepared is not None and not torch.compiler.is_compiling():
            out = torch.empty(stop - start, self.cols)
            prepared[0].vectors_rows(prepared[1], start, stop, out.data_ptr(), threads_for(out.numel()))
            return out
        return self._decoded(self.codes.unpack(start, stop))

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        return self._decoded(self.codes.select(index))

    def _decoded(self, codes: Int[Tensor, "some vectors"]) -> F32[Tensor, "some cols"]:
        return self.codewords.index_select(0, codes.reshape(-1).int()).reshape(len(codes), self.cols)

    def linear(self, x: F32[Tensor, "batch cols"], bias: F32[Tensor, " rows"] | None) -> F32[Tensor, "batch rows"]:
        most = MOST_LOOKED_UP if self.codes.bits > 4 else MOST_PERMUTED
        prepared = self._native() if len(x) <= most and is_plain(x) else None
        if prepared is None:
            return self._by_torch(x, bias)
        return prepared[2](x, bias)

    def _native(self) -> tuple[Any, Any, Product] | None:
        """The compiled loops, their argument, and the product by tables."""
        if self._prepared is None and self.codewords.is_cpu and (library := native.compiled()) is not None:
            kept = self.codes.words, self.table, self.codewords
            structure = native.Vectors(
                *(tensor.data_ptr() for tensor in kept),
                self.rows,
                self.cols,
                self.codewords.shape[1],
                self.table.shape[1],
                self.codes.bits,
            )
            product = native_product(library.vectors_look_up, structure, kept, self.rows, self.rows * self.cols)
            self._prepared = library, ctypes.byref(structure), product
        return self._prepared


def _grid(quantized: Quantized) -> Grid:
    recipe = quantized.recipe
    assert isinstance(recipe, Codebook)
    return Grid.of(quantized.shape, recipe.block, pad=recipe.pad)
