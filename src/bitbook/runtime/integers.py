"""Integer arithmetic: where an input is quantized, its whole numbers meet the weights' without any float in between.

    x ──scale, round──► integers ──┐
                                   ├─► Σ, exact in 32 bits ──► · (scale of x · scale of the row) + bias
    codes of w, less their zero  ──┘

What training simulated with rounded floats, up to the rounding of its own sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Tensor

from bitbook.artifact import QuantizedInput
from bitbook.quantizer import FitOptions, Range
from bitbook.runtime import native
from bitbook.runtime.levels import Levels
from bitbook.runtime.products import Prepared, Product, native_product
from bitbook.scalar.uniform import Uniform

_LARGEST_SUM = (1 << 31) - 1
_RULES: Mapping[Range | None, int] = {"minmax": native.MINMAX, "absmax": native.ABSMAX, None: native.MINMAX}


class Rounded(NamedTuple):
    """An input as whole numbers: `x ≈ steps · scale`."""

    steps: F32[Tensor, "batch cols"]
    scale: F32[Tensor, ""]


class Integers(Prepared):
    """The product of a quantized input with weights of evenly spaced levels; `of` says which it serves."""

    how = "integer arithmetic"
    weights: Levels
    sums: Tensor
    zeros: Tensor

    def __init__(self, weights: Levels, quantized: QuantizedInput, recipe: Uniform, zeros: Tensor, factor: int) -> None:
        super().__init__()
        object.__setattr__(self, "weights", weights)  # no child, since the layer has it
        self.recipe, self.factor = recipe, factor
        self.rule: Range | None = quantized.activation.rule
        self.side = {name: side.decode() for name, side in quantized.side.items()}
        self.register_buffer("zeros", zeros)
        self.register_buffer("sums", self._whole(0, weights.rows).sum(1, dtype=torch.int32))

    @classmethod
    def of(cls, weights: Levels, quantized: QuantizedInput) -> Integers | None:
        """None unless weights and input are whole numbers times a scale of the row, and no sum is too large."""
        recipe = quantized.activation.recipe
        if not isinstance(recipe, Uniform) or weights.scale.shape[1] > 1:
            return None
        table = weights.levels
        factor = int(table[1] - table[0]) if len(table) > 1 else 1
        counted = torch.arange(len(table), device=table.device)
        if factor not in (1, 2) or not torch.equal(table, table[0].round() + factor * counted):
            return None
        zero = -table[0] if weights.offset is None else -table[0] - weights.offset.float()
        if not torch.equal(zero, zero.round()):
            return None
        blocks = torch.arange(weights.rows, device=table.device) // weights.block[0]
        zeros = zero.reshape(-1)[blocks if zero.numel() > 1 else torch.zeros_like(blocks)].int().contiguous()
        largest = factor * len(table) + int(zeros.abs().max())
        if 2 * recipe.alphabet * largest * weights.cols > _LARGEST_SUM:
            return None
        return cls(weights, quantized, recipe, zeros, factor)

    def _by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.reference(x)[1]
        return y if bias is None else y.add_(bias)

    def reference(self, x: F32[Tensor, "batch cols"]) -> tuple[Int[Tensor, "batch rows"], F32[Tensor, "batch rows"]]:
        """The integer sums, and these times both scales in the type of the input; any device."""
        steps, scale = self.rounded(x.float())
        sums = torch.empty(len(x), self.weights.rows, dtype=torch.int32, device=x.device)
        step = self.weights.tile_rows
        for start in range(0, self.weights.rows, step):
            stop = min(start + step, self.weights.rows)
            # Doubles hold such products and sums exactly.
            sums[:, start:stop] = (steps.double() @ self._whole(start, stop).double().T).int()
        return sums, (sums.float() * (scale * self._row_scales())).to(x.dtype)

    def rounded(self, x: F32[Tensor, "batch cols"]) -> Rounded:
        """The input's whole numbers, zero point taken away, as the simulation of `inputs.py` has them."""
        recipe = self.recipe
        side = self.side or dict(recipe.refresh(x, {}, FitOptions(range=self.rule)))
        scale, zero = side["scale"].to(x.device).reshape(()), side.get("zero_point")
        steps = (x / scale).round()
        if zero is None:
            return Rounded(steps.clamp(-recipe.q_max, recipe.q_max), scale)
        zero = zero.to(x.device).reshape(())
        return Rounded((steps + zero).clamp(0, recipe.alphabet - 1) - zero, scale)

    def _whole(self, start: int, stop: int) -> Int[Tensor, "some cols"]:
        """Some rows of the weights as whole numbers."""
        return self.factor * self.weights.codes.unpack(start, stop).int() - self.zeros[start:stop, None]

    def _row_scales(self) -> F32[Tensor, " rows"]:
        blocks = torch.arange(self.weights.rows, device=self.zeros.device) // self.weights.block[0]
        return self.weights.scale.float()[blocks, 0]

    def _product(self) -> Product | None:
        library, weights = native.compiled(), self.weights
        if library is None or not self.zeros.is_cpu or self.rule not in _RULES:
            return None
        scales = self._row_scales().contiguous()
        kept = weights.codes.words, scales, self.zeros, self.sums
        given = {name: float(value) for name, value in self.side.items()}
        structure = native.Integers(
            *(tensor.data_ptr() for tensor in kept),
            weights.rows,
            weights.cols,
            weights.codes.bits,
            self.factor,
            int(self.recipe.symmetric),
            self.recipe.q_max if self.recipe.symmetric else self.recipe.alphabet - 1,
            native.GIVEN if given else _RULES[self.rule],
            given.get("scale", 0.0),
            given.get("zero_point", 0.0),
        )
        return native_product(library.integers_linear, structure, kept, weights.rows, weights.rows * weights.cols)

    def extra_repr(self) -> str:
        return f"input {self.recipe!r}"
