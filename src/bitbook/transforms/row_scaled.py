"""Row scales around any recipe, so that errors of all rows count alike: bits go to the rows that matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float as F32
from torch import Generator, Tensor

from bitbook.blocks import Shape, matrix_shape
from bitbook.quantizer import Child, FitOptions, Quantizer
from bitbook.scalar.ecsq import ECSQ
from bitbook.transforms.transform import Transform

STEP = 0.5
"""Between scales, in octaves: a scale that is off by half of it costs a hundredth of a bit per weight."""
_FURTHEST = 8.0  # octaves from the middle, beyond which a row is as good as without weight


@dataclass(frozen=True, repr=False)
class RowScaled(Transform):
    """The inner recipe works on rows divided by scales, `w = 2^rows · x`, small ones for rows whose errors weigh much.

    Scales are fitted to the importance alone, one over its root mean square in each row, so that in x an error of any
    row is as bad as of any other: reverse waterfilling over the rows (Cover & Thomas 2006, section 10.3.3).  One step
    for the whole matrix then spends half a bit on a row for each factor of two in importance.  Without importance,
    all scales are one.

    The side tensor `rows` are logarithms to base 2, by default whole numbers of half an octave.
    """

    rows: Quantizer = ECSQ()

    own: ClassVar[tuple[str, ...]] = ("rows",)

    def own_children(self, shape: Shape) -> Mapping[str, Child]:
        return {"rows": Child(self.rows, (matrix_shape(shape)[0], 1))}

    def side_options(self, name: str, options: FitOptions) -> FitOptions:
        if name in self.own:
            return FitOptions(step=STEP, iterations=0)
        return super().side_options(name, options)

    def find(
        self, w: Tensor, importance: Tensor | None, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        rows = matrix_shape(tuple(w.shape))[0]
        if importance is None:
            return {"rows": w.new_zeros(rows, 1)}
        weight = importance.reshape(matrix_shape(tuple(w.shape))).double().mean(1, keepdim=True)
        if not bool((weight > 0).any()):
            return {"rows": w.new_zeros(rows, 1)}
        octaves = -0.5 * torch.log2(weight.clamp_min(float(weight[weight > 0].min())))
        octaves -= octaves.median()
        return {"rows": octaves.clamp(-_FURTHEST, _FURTHEST).float()}

    def forward(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        scales = _scales(own)
        return (w.reshape(matrix_shape(tuple(w.shape))) / scales).reshape(w.shape)

    def back(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        scales = _scales(own)
        return (x.reshape(matrix_shape(tuple(x.shape))) * scales).reshape(x.shape)

    def inputs(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return torch.eye(matrix_shape(tuple(w.shape))[1], dtype=w.dtype, device=w.device)

    def row_factors(self, own: Mapping[str, Tensor]) -> F32[Tensor, " rows"]:
        return _scales(own).flatten()

    def inner_options(self, options: FitOptions, own: Mapping[str, Tensor]) -> FitOptions:
        if options.step is None:
            return options
        shrinks = torch.exp2(-2 * own["rows"].double()).mean().sqrt()
        return replace(options, step=options.step * float(shrinks))

    def importance_of(self, w: Tensor, importance: Tensor | None, own: Mapping[str, Tensor]) -> Tensor | None:
        squares = _scales(own).square()
        if importance is None and bool((squares == 1).all()):
            return None
        weights = torch.ones_like(w) if importance is None else importance
        return (weights.reshape(matrix_shape(tuple(w.shape))) * squares).reshape(w.shape)


def _scales(own: Mapping[str, Tensor]) -> F32[Tensor, "rows 1"]:
    """Powers of two, through float64: its last bit differs between platforms, float32's then does not."""
    return torch.exp2(own["rows"].double()).float()
