"""Codebooks: products with codewords, of which every row needs some.

rows      x · centroidsᵀ, then a gather        K / rows of the multiplications, and nothing else changes
vectors   few inputs: tables of every codeword's product with each part of x, looked up and added
          many: some rows decoded at a time, then a plain product
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Tensor

from bitbook.blocks import Grid
from bitbook.quantizer import Quantized, StreamSpec
from bitbook.runtime import native
from bitbook.runtime.levels import Levels, is_plain
from bitbook.runtime.loops import LANES
from bitbook.runtime.packed import Dense, Packed, Streams
from bitbook.runtime.packing import PackedCodes, threads_for
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

    def linear(self, x: F32[Tensor, "batch cols"], bias: F32[Tensor, " rows"] | None) -> F32[Tensor, "batch rows"]:
        if self._prepared is None:
            self._prepared = self._native() or self._plain()
        return self._prepared(x, bias)

    def _plain(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The product by torch."""
        product, labels = self.centroids.linear, self.labels

        def linear(x: Tensor, bias: Tensor | None) -> Tensor:
            y = product(x, None).index_select(1, labels)
            return y if bias is None else y.add_(bias)

        return linear

    def _native(self) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """The product by native.c, of centroids that are floats."""
        library, panels = native.library(), self.centroids
        if library is None or not isinstance(panels, Panels) or not panels.values.is_cpu:
            return None
        kept = panels.values, self.labels
        pointers = (tensor.data_ptr() for tensor in kept)
        structure = native.Rows(*pointers, self.rows, self.cols, len(panels.values))
        reference, rows, call = ctypes.byref(structure), self.rows, library.rows_linear
        size, plain = panels.values.numel(), self._plain()

        def linear(x: Tensor, bias: Tensor | None, _: Any = (kept, structure)) -> Tensor:
            if not is_plain(x):
                return plain(x, bias)
            n = len(x)
            y, pointer = torch.empty(n, rows), None if bias is None else bias.data_ptr()
            if not call(reference, pointer, x.data_ptr(), n, y.data_ptr(), threads_for(n * size)):
                raise MemoryError(f"a product of {n} × {rows} finds no room for its input")
            return y

        return linear


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
            return super().linear(x, bias)
        y, pointer = torch.empty(len(x), self.rows), None if bias is None else bias.data_ptr()
        threads = threads_for(len(x) * self.rows * self.cols)
        if not prepared[0].vectors_look_up(prepared[1], pointer, x.data_ptr(), len(x), y.data_ptr(), threads):
            raise MemoryError(f"a product with {self.rows} × {self.cols} weights finds no room for its tables")
        return y

    def _native(self) -> tuple[Any, Any, Any] | None:
        """The compiled loops, their argument, and what that points to."""
        if self._prepared is None and self.codewords.is_cpu and (library := native.library()) is not None:
            kept = self.codes.words, self.table, self.codewords
            structure = native.Vectors(
                *(tensor.data_ptr() for tensor in kept),
                self.rows,
                self.cols,
                self.codewords.shape[1],
                self.table.shape[1],
                self.codes.bits,
            )
            self._prepared = library, ctypes.byref(structure), kept
        return self._prepared


def _grid(quantized: Quantized) -> Grid:
    recipe = quantized.recipe
    assert isinstance(recipe, Codebook)
    return Grid.of(quantized.shape, recipe.block, pad=recipe.pad)
