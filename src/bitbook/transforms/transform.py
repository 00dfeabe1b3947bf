"""Transforms: a recipe that works on an easier tensor, from which the decoder comes back.

    w ──forward──► x ──inner.encode──► codes ──inner.decode──► x̂ ──back──► ŵ

The codes are the inner recipe's; its side tensors stand beside those that the transform itself needs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from bitbook.blocks import Grid, Shape, matrix_shape
from bitbook.errors import PlanError
from bitbook.feedback.columns import Feedback
from bitbook.quantizer import (
    Child,
    FitOptions,
    Price,
    Quantized,
    Quantizer,
    StraightThrough,
    StreamSpec,
    quantize_side,
)

_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Transform(Quantizer):
    """What all transforms share; a subclass says `forward`, `back` and what of the importance remains."""

    inner: Quantizer

    own: ClassVar[tuple[str, ...]] = ()
    """The names of its own side tensors."""

    @abstractmethod
    def forward(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The tensor that the inner recipe works on, of w's shape; differentiable."""

    @abstractmethod
    def back(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Undo `forward`; differentiable, also in the transform's own side tensors."""

    @abstractmethod
    def importance_of(self, w: Tensor, importance: Tensor | None, own: Mapping[str, Tensor]) -> Tensor | None:
        """How squared errors of the inner tensor weigh, where errors of `w` weigh `importance`."""

    def inputs(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """A, `(cols, cols)`, such that rows of `back` are rows of the inner tensor times Aᵀ, up to a factor each."""
        cols = matrix_shape(tuple(w.shape))[1]
        return self.back(torch.eye(cols, dtype=w.dtype, device=w.device), own).T

    def row_factors(self, own: Mapping[str, Tensor]) -> Tensor | None:
        """A factor for each row, `(rows,)`, if errors of rows of the inner tensor weigh differently for that."""
        return None

    def inner_options(self, options: FitOptions, own: Mapping[str, Tensor]) -> FitOptions:
        """How the inner recipe is fitted; a step of the weights is not always one of the inner tensor's."""
        return options

    def grids(self, shape: Shape) -> Iterator[Grid]:
        return self.inner.grids(shape)

    def own_children(self, shape: Shape) -> Mapping[str, Child]:
        """The transform's own side tensors."""
        return {}

    def find(
        self, w: Tensor, importance: Tensor | None, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        """Fit the transform's own side tensors."""
        return {}

    @property
    def trains_codes(self) -> bool:  # type: ignore[override]
        return self.inner.trains_codes

    @property
    def learns_side(self) -> bool:  # type: ignore[override]
        return self.inner.learns_side

    @property
    def codes_by_row(self) -> bool:  # type: ignore[override]
        return self.inner.codes_by_row

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> Transform:
        inner = None if side is None else self._split(side)[1]
        return replace(self, inner=self.inner.resolve(shape, inner))

    def decoder(self) -> Transform:
        return replace(self, inner=self.inner.decoder())

    def with_children(self, children: Mapping[str, Quantizer]) -> Transform:
        own = {f.name: children[f.name] for f in fields(self) if f.name in children}
        return replace(self, inner=self.inner.with_children(children), **own)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        return self.inner.layout(shape)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        own, inner = self.own_children(shape), self.inner.children(shape)
        for name in filter(inner.__contains__, own):
            raise PlanError(f"{self!r}: it and its inner recipe both have a side tensor {name!r}; nest it only once")
        return {**own, **inner}

    def child_options(self, options: FitOptions) -> FitOptions:
        return self.inner.child_options(options)

    def side_options(self, name: str, options: FitOptions) -> FitOptions:
        """A transform's own are positive, as scales are."""
        return FitOptions(range="absmax") if name in self.own else self.inner.side_options(name, options)

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        found = self.find(w, importance, options, generator)
        own = self._stored(found, tuple(w.shape), options)
        weights = self.importance_of(w, importance, own)
        below = self.inner_options(options, own)
        inner = self.inner.fit(self.forward(w, own), importance=weights, options=below, generator=generator)
        return {**found, **inner}

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        """The inner recipe's follow; the transform stays as it was fitted."""
        own, inner = self._split(side)
        return {**own, **self.inner.refresh(self.forward(w, own), inner, options)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        own, inner = self._split(side)
        weights = self.importance_of(w, importance, own)
        return self.inner.encode(self.forward(w, own), inner, importance=weights)

    def encode_priced(
        self, w: Tensor, side: Mapping[str, Tensor], price: Price, *, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        own, inner = self._split(side)
        weights = self.importance_of(w, importance, own)
        return self.inner.encode_priced(self.forward(w, own), inner, price, importance=weights)

    def fit_fed_back(
        self, w: Tensor, feedback: Feedback, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        found = self.find(w, feedback.importance(tuple(w.shape)), options, generator)
        own = self._stored(found, tuple(w.shape), options)
        mapped = feedback.mapped(self.inputs(w, own).double(), self.row_factors(own))
        below = self.inner_options(options, own)
        return {**found, **self.inner.fit_fed_back(self.forward(w, own), mapped, below, generator)}

    def encode_fed_back(
        self, w: Tensor, side: Mapping[str, Tensor], feedback: Feedback, price: Price | None = None
    ) -> dict[str, Tensor]:
        own, inner = self._split(side)
        mapped = feedback.mapped(self.inputs(w, own).double(), self.row_factors(own))
        return self.inner.encode_fed_back(self.forward(w, own), inner, mapped, price)

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        own, inner = self._split(side)
        return self.back(self.inner.decode(codes, inner, shape), own)

    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        """The inner recipe's, between `forward` and `back`."""
        own, inner = self._split(side)
        if not self.inner.trains_codes:  # may weigh errors as it encodes, which a surrogate does not
            with torch.no_grad():
                codes = self.encode(w, side)
            return StraightThrough.apply(w, self.decode(codes, side, tuple(w.shape)))
        return self.back(self.inner.surrogate(self.forward(w, own), inner, options), own)

    def recentre(
        self, w: Tensor, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], *, importance: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        own, inner = self._split(side)
        weights = self.importance_of(w, importance, own)
        return {**own, **self.inner.recentre(self.forward(w, own), codes, inner, importance=weights)}

    @property
    def price_of_step(self) -> float:  # type: ignore[override]
        return self.inner.price_of_step

    @property
    def independent_blocks(self) -> bool:  # type: ignore[override]
        return self.inner.independent_blocks

    def without_unused(self, quantized: Quantized) -> Quantized:
        own, inner = self._split(quantized.side)
        kept = self.inner.without_unused(Quantized(self.inner, quantized.shape, quantized.codes, inner))
        return Quantized(replace(self, inner=kept.recipe), kept.shape, kept.codes, {**own, **kept.side})

    def _stored(self, found: Mapping[str, Tensor], shape: Shape, options: FitOptions) -> dict[str, Tensor]:
        """Its own side tensors as the file gives them back: what the inner recipe is fitted behind."""
        return {
            name: quantize_side(child.recipe, found[name], self.side_options(name, options)).decode()
            for name, child in self.own_children(shape).items()
        }

    def _split(self, side: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
        """Side tensors of the transform, and those of the inner recipe."""
        inner = {name: value for name, value in side.items() if name not in self.own}
        return {name: value for name, value in side.items() if name in self.own}, inner
