"""Signs in a stream of their own, and any quantizer for the magnitudes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from bitbook.blocks import Grid, Shape, matrix_shape
from bitbook.errors import PlanError
from bitbook.quantizer import Child, FitOptions, Quantizer, StreamSpec


@dataclass(frozen=True, repr=False)
class SignMagnitude(Quantizer):
    """`ŵ = ± m̂` with `m̂` what `inner` makes of |w|, at least zero; a stream of signs, 1 where `ŵ < 0`, comes last.

    A codebook of magnitudes serves 2^d vectors with one codeword, as E8-like lattices do (Tseng et al. 2024, QuIP#).
    A weight whose magnitude becomes zero has sign 0, so that coders learn where signs say nothing.
    """

    inner: Quantizer

    def __post_init__(self) -> None:
        innermost = self.inner
        while not isinstance(innermost, SignMagnitude) and isinstance(getattr(innermost, "inner", None), Quantizer):
            innermost = innermost.inner  # type: ignore[attr-defined]  # a transform's, whose streams are its own
        if not isinstance(innermost, Quantizer) or isinstance(innermost, SignMagnitude):
            raise PlanError(f"SignMagnitude(inner={self.inner!r:.80}): use a quantizer of magnitudes, without signs")
        # As the inner quantizer does.
        for name in ("trains_codes", "learns_side", "idempotent", "independent_blocks", "codes_by_row"):
            object.__setattr__(self, name, getattr(self.inner, name))

    def decoder(self) -> SignMagnitude:
        return SignMagnitude(self.inner.decoder())

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> SignMagnitude:
        return replace(self, inner=self.inner.resolve(shape, side))

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        return (*self.inner.layout(shape), StreamSpec("signs", matrix_shape(shape), 2))

    def children(self, shape: Shape) -> Mapping[str, Child]:
        return self.inner.children(shape)

    def with_children(self, children: Mapping[str, Quantizer]) -> SignMagnitude:
        return replace(self, inner=self.inner.with_children(children))

    def side_options(self, name: str, options: FitOptions) -> FitOptions:
        return self.inner.side_options(name, options)

    def grids(self, shape: Shape) -> Iterator[Grid]:
        return self.inner.grids(shape)

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        return self.inner.fit(w.abs(), importance=importance, options=options, generator=generator)

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        return self.inner.refresh(w.abs(), side, options)

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        codes = self.inner.encode(w.abs(), side, importance=importance)
        below = (w < 0) & (self.inner.decode(codes, side, tuple(w.shape)) > 0)
        return {**codes, "signs": below.to(torch.uint8).reshape(matrix_shape(tuple(w.shape)))}

    def columns(self, shape: Shape) -> int:
        return self.inner.columns(shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        inner, own = self.inner.part(shape, side, start, stop)
        return SignMagnitude(inner), own

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        size = self.inner.decode({n: c for n, c in codes.items() if n != "signs"}, side, shape).clamp_min(0)
        return torch.where(codes["signs"].reshape(shape).bool(), -size, size)
