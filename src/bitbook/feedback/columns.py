"""Encoding a matrix a few columns at a time, which is what lets the error of some columns steer the choice of others.

    recipe.encode_fed_back(w, side, feedback)
      └ feedback.encode(w, encoder)              goes over the columns, and says what each is to come near to
          └ encoder.choose(target, start, ·)     codes of `encoder.width` columns; what they decode to goes back

Most recipes only say how wide their parts are and how side tensors are cut to a part (`Quantizer.columns`, `part`);
`Parts` is their encoder.  A recipe whose codes depend on the codes before, as a trellis' do, brings an encoder of its
own; a wrapper that encodes another tensor than `w` passes that and the changed second moments on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Tensor

from bitbook.blocks import Shape, matrix_shape

if TYPE_CHECKING:
    from bitbook.quantizer import Price, Quantizer


class ColumnEncoder(ABC):
    """Chooses the codes of a matrix part by part: adjacent columns, each once.

    `choose` and `codes` are all that is needed.
    """

    width: int
    """Columns of a part; the last may have fewer."""
    ordered: bool = False
    """Whether parts must come from left to right, because codes depend on those before."""

    @abstractmethod
    def choose(
        self, target: F32[Tensor, "rows c"], start: int, metric: F64[Tensor, "groups c c"]
    ) -> F32[Tensor, "rows c"]:
        """Choose the codes of the columns from `start` on, and return what they decode to.

        The least `e M eᵀ` of each row's error e is asked for; M is the metric of the row's group (equal, adjacent
        shares of the rows).
        """

    @abstractmethod
    def codes(self) -> dict[str, Tensor]:
        """All codes, once every part was chosen."""

    def choose_batch(
        self,
        w: F64[Tensor, "groups rows n"],
        carried: F64[Tensor, "groups rows n"],
        root: F64[Tensor, "groups n n"],
        parts: list[tuple[int, int]],
    ) -> F64[Tensor, "groups rows n"]:
        """Choose several parts in turn, the error of each fed back into those that follow, and return their values.

        w: the columns of all parts; carried: Σ E R over the columns before them; root: their own block of R (see
        `error_feedback.py`); parts: the first column of each and the one after its last.
        """
        groups, rows, _ = w.shape
        values, errors, at = torch.empty_like(w), torch.zeros_like(w), 0
        for start, stop in parts:
            to = at + stop - start
            own = root[:, at:to, at:to]
            fed = carried[:, :, at:to] + errors[:, :, :at] @ root[:, :at, at:to]
            fed = fed / own if to - at == 1 else torch.linalg.solve_triangular(own, fed, upper=True, left=False)
            target = (w[:, :, at:to] - fed).reshape(groups * rows, to - at).float()
            values[:, :, at:to] = self.choose(target, start, own @ own.mT).reshape(groups, rows, to - at).double()
            errors[:, :, at:to] = values[:, :, at:to] - w[:, :, at:to]
            at = to
        return values


class BatchEncoder(ColumnEncoder):
    """An encoder of single columns whose one loop is `choose_batch`; a column alone is a batch of one."""

    width = 1

    def choose(
        self, target: F32[Tensor, "rows 1"], start: int, metric: F64[Tensor, "groups 1 1"]
    ) -> F32[Tensor, "rows 1"]:
        shape = (len(metric), len(target) // len(metric), 1)
        w, nothing = target.double().reshape(shape), torch.zeros(shape, dtype=torch.float64)
        return self.choose_batch(w, nothing, metric.sqrt(), [(start, start + 1)]).reshape(-1, 1).float()

    @abstractmethod
    def choose_batch(
        self,
        w: F64[Tensor, "groups rows n"],
        carried: F64[Tensor, "groups rows n"],
        root: F64[Tensor, "groups n n"],
        parts: list[tuple[int, int]],
    ) -> F64[Tensor, "groups rows n"]: ...


class Feedback(Protocol):
    """What goes over the columns: `ErrorFeedback`, as recipes see it."""

    def encode(self, w: Tensor, encoder: ColumnEncoder) -> dict[str, Tensor]:
        """The codes of `w`, the error of each part fed back into those that follow."""
        ...

    def importance(self, shape: Shape) -> Tensor:
        """The second moments' diagonal as weights of the squared errors of a tensor of `shape`, a mean of one."""
        ...

    def remaining(self, shape: Shape) -> Tensor:
        """R_kk², what of an error no later column can make up for, as weights of a tensor of `shape`; a mean of one."""
        ...

    def mapped(self, inputs: F64[Tensor, "cols new"], rows: F64[Tensor, " rows"] | None = None) -> Feedback:
        """The same for a tensor `v` that stands for `w = v · inputsᵀ`: scaled, permuted or rotated columns.

        With `rows`, for one that stands for `w = rows · v · inputsᵀ`, a factor for each row.
        """
        ...


class Parts(ColumnEncoder):
    """The encoder of recipes whose columns are encoded apart: every part is a tensor of its own."""

    def __init__(self, recipe: Quantizer, shape: Shape, side: Mapping[str, Tensor], price: Price | None) -> None:
        self.recipe, self.shape, self.side, self.price = recipe, shape, side, price
        self.width = recipe.columns(shape)
        self._cols = matrix_shape(shape)[1]
        self._grids = {spec.name: spec.grid for spec in recipe.layout(shape)}
        self._chosen: dict[int, dict[str, Tensor]] = {}

    def choose(
        self, target: F32[Tensor, "rows c"], start: int, metric: F64[Tensor, "groups c c"]
    ) -> F32[Tensor, "rows c"]:
        stop = start + target.shape[1]
        recipe, side = self.recipe.part(self.shape, self.side, start, stop)
        price = self.price
        if price is not None:
            bits = {}
            for spec in recipe.layout(tuple(target.shape)):
                count = spec.grid[1]
                at = self._grids[spec.name][1] - count if stop == self._cols else start // self.width * count
                bits[spec.name] = price.bits[spec.name].columns(at, at + count)
            price = replace(price, bits=bits)
        codes = recipe.encode_part(target, side, metric, price)
        self._chosen[start] = codes
        return recipe.decode(codes, side, tuple(target.shape))

    def codes(self) -> dict[str, Tensor]:
        parts = [codes for _, codes in sorted(self._chosen.items())]
        return {name: torch.cat([codes[name] for codes in parts], 1) for name in self._grids}
