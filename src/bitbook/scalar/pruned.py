"""Magnitude pruning: most weights are zero, the others go through any quantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.feedback.columns import Feedback
from bitbook.quantizer import Child, FitOptions, Price, Quantizer, StreamSpec, quantize_side
from bitbook.scalar.leaves import Float


@dataclass(frozen=True, repr=False)
class Pruned(Quantizer):
    """Keep the `keep` weights of largest magnitude (Han et al. 2016); a mask says which.

    `keep` is a number of weights, or a float in (0, 1]: that fraction, rounded down, at least one.  The kept
    values, in reading order, are a side tensor stored through `values`.  Training keeps the mask.
    """

    keep: int | float
    values: Quantizer = Float()

    trains_codes = False

    def __post_init__(self) -> None:
        whole = type(self.keep) is int and self.keep >= 1
        if not whole and not (type(self.keep) is float and 0 < self.keep <= 1):
            raise PlanError(f"Pruned(keep={self.keep!r}): use a whole number of weights, or a fraction in (0, 1]")

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> Pruned:
        size = math.prod(shape)
        keep = self.keep if type(self.keep) is int else max(math.floor(size * self.keep + 1e-9), 1)
        if keep > size:
            raise PlanError(f"Pruned(keep={keep}) of {size} weights: use at most {size}, or a fraction")
        return Pruned(keep if side is None else len(side["values"]), self.values)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        return (StreamSpec("mask", matrix_shape(shape), 2),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        if type(self.keep) is not int:
            raise PlanError(f"{self!r} needs a shape to become a number of weights; call resolve(shape) first")
        return {"values": Child(self.values, (self.keep,))}

    def child_options(self, options: FitOptions) -> FitOptions:
        """Kept values are signed like weights: the same range rule serves them."""
        return options

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        recipe = self
        while True:
            values = w.flatten()[recipe._kept(w, importance).flatten().bool()]
            if len(values) == 1:
                return {"values": values}
            stored = quantize_side(self.values, values, self.child_options(options)).decode()
            nonzero = int(stored.count_nonzero())
            if nonzero == len(values):
                return {"values": values}
            # A kept weight that is stored as zero costs a code for what the mask says for free.
            recipe = Pruned(max(nonzero, 1), self.values)

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        return {"mask": self._kept(w, importance)}

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        """The mask, which is fixed first; kept values make up for the others as the encoder fits them anew."""
        if price is not None:
            return self.encode_priced(w, side, price)
        return self.encode(w, side, importance=feedback.importance(tuple(w.shape)))

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        values = side["values"]
        where = codes["mask"].flatten().nonzero().squeeze(1)
        if len(where) != len(values):
            raise CorruptArtifact(f"a mask of {len(where)} weights stands beside {len(values)} values")
        return values.new_zeros(math.prod(shape)).index_copy(0, where, values).reshape(shape)

    def _kept(self, w: Tensor, importance: Tensor | None) -> Tensor:
        """1 for the `keep` largest of importance · w², ties to the first, as `(rows, cols)`."""
        cost = w.square() if importance is None else importance * w.square()
        order = cost.flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros(w.numel(), dtype=torch.uint8, device=w.device)
        assert type(self.keep) is int
        mask[order[: self.keep]] = 1
        return mask.reshape(matrix_shape(tuple(w.shape)))
