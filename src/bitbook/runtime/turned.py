"""Orthogonal transforms: inputs go through them once, instead of all weights.

x · (W R)ᵀ = (x Rᵀ) · Wᵀ            R: a rotation, or an order of the columns
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Tensor

from bitbook.quantizer import Quantized
from bitbook.runtime.packed import Packed
from bitbook.transforms.permuted import Permuted
from bitbook.transforms.rotated import Rotated
from bitbook.transforms.transform import Transform


class Turned(Packed):
    """`Rotated` and `Permuted`: the inner tensor in a form of its own, and inputs that are transformed."""

    how = "inputs transformed"
    recipe: Transform

    def __init__(self, quantized: Quantized, inner: Packed) -> None:
        super().__init__(quantized.recipe, quantized.shape)
        self.inner = inner
        self.own = {name: quantized.side[name].decode() for name in self.recipe.own if name in quantized.side}

    @classmethod
    def of(cls, quantized: Quantized, pack: Callable[[Quantized], Packed]) -> Turned:
        """The tensor in this form, the inner one as `pack` has it."""
        recipe = quantized.recipe
        assert isinstance(recipe, Rotated | Permuted)
        side = {name: child for name, child in quantized.side.items() if name not in recipe.own}
        return cls(quantized, pack(Quantized(recipe.inner, quantized.shape, quantized.codes, side)))

    @property
    def tile_rows(self) -> int:
        return self.inner.tile_rows

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        return self.recipe.back(self.inner.tile(start, stop), self.own)

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        return self.recipe.back(self.inner.select(index), self.own)

    def linear(self, x: F32[Tensor, "batch cols"], bias: F32[Tensor, " rows"] | None) -> F32[Tensor, "batch rows"]:
        return self.inner.linear(self.recipe.forward(x, self.own), bias)
