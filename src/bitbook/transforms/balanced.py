"""Row and column scales around any recipe, found by balancing (Müller et al. 2025, "SINQ"; Sinkhorn & Knopp 1967)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import PlanError
from bitbook.feedback.columns import Feedback
from bitbook.quantizer import Child, FitOptions, Price, Quantizer
from bitbook.scalar.leaves import Float
from bitbook.scalar.uniform import SMALLEST_SCALE
from bitbook.transforms.transform import Transform

_ROUNDS = 16  # rows and columns are balanced to a percent much earlier, unless zeros keep them from it


@dataclass(frozen=True, repr=False)
class Balanced(Transform):
    """The inner recipe works on `w / (r · c)`: each row divided by a scale r, each column by a scale c.

    Rows and columns are divided by their root mean squares in turn until all are one, so that an outlier row *or*
    column no longer sets the range of everything.  Both sets of scales are side tensors, stored through `rows` and
    `cols`.  Squared errors of the inner tensor weigh (r · c)², times the importance where there is one.
    """

    rows: Quantizer = Float("bfloat16")
    cols: Quantizer = Float("bfloat16")

    own: ClassVar[tuple[str, ...]] = ("rows", "cols")

    def own_children(self, shape: Shape) -> Mapping[str, Child]:
        rows, cols = matrix_shape(shape)
        return {"rows": Child(self.rows, (rows, 1)), "cols": Child(self.cols, (1, cols))}

    def find(
        self, w: Tensor, importance: Tensor | None, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        rows, cols = balance(w.reshape(matrix_shape(tuple(w.shape))))
        return {"rows": rows, "cols": cols}

    def forward(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        scales = _product(own)
        # A scale that is stored as zero (or below) is a zero row or column.
        return (w.reshape(scales.shape) / scales.masked_fill(scales <= 0, torch.inf)).reshape(w.shape)

    def back(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        scales = _product(own)
        return (x.reshape(scales.shape) * scales).reshape(x.shape)

    def inputs(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return own["cols"].flatten().diag()

    def inner_options(self, options: FitOptions, own: Mapping[str, Tensor]) -> FitOptions:
        if options.step is None:
            return options
        scale = float(_product(own).double().square().mean().sqrt())
        return replace(options, step=options.step / scale) if scale > 0 else options

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        if price is not None:
            raise PlanError(
                f"{self!r}: errors of its rows weigh differently, which a price with error feedback does not see; "
                "leave out the price or the feedback, or use its inner recipe alone"
            )
        return super().encode_fed_back(w, side, feedback)

    def importance_of(self, w: Tensor, importance: Tensor | None, own: Mapping[str, Tensor]) -> Tensor:
        weights = _product(own).square().reshape(w.shape)
        return weights if importance is None else importance * weights


def balance(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scales `(rows, 1)` of the weights' size and `(1, cols)` around one.

    A row of zeros has the root mean square of all weights, a column of zeros one.
    """
    rows, cols = w.square().mean().sqrt().expand(len(w), 1), w.new_ones(1, w.shape[1])
    for _ in range(_ROUNDS):
        rows = rows * _rms(w / (rows * cols).clamp_min(SMALLEST_SCALE), 1)
        cols = cols * _rms(w / (rows * cols).clamp_min(SMALLEST_SCALE), 0)
    return rows.clamp_min(SMALLEST_SCALE), cols


def _rms(x: Tensor, axis: int) -> Tensor:
    """Root mean squares, one where all is zero: nothing to divide by."""
    rms = x.square().mean(axis, keepdim=True).sqrt()
    return torch.where(rms > 0, rms, 1)


def _product(own: Mapping[str, Tensor]) -> Tensor:
    return own["rows"] * own["cols"]
