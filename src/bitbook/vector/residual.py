"""Residual quantization: stages of any kind, each of which codes what those before it leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Generator, Tensor

from bitbook.blocks import Grid, Shape
from bitbook.errors import PlanError
from bitbook.quantizer import Child, FitOptions, Quantizer, StreamSpec, code_dtype, quantize_side
from bitbook.vector.additive import beam_search, least_squares
from bitbook.vector.codebook import Codebook, block_weights

MOST_STAGES = 16
BEAM = 8
_T = TypeVar("_T")
_ROUNDS = 4  # of codes and codebooks in turn; later ones gain a few thousandths


@dataclass(frozen=True, repr=False)
class Residual(Quantizer):
    """A sum of stages: `ŵ = Σ_m ŵ_m`, each fitted to what the stages before it leave (Juang & Gray 1982).

    `Residual((Codebook(64, (1, 4)), Uniform(2, (1, 16))))` corrects vectors by scalars.  Streams and side tensors are
    those of the stages, numbered from 1.

    Stages that are all codebooks of one block are an additive quantizer: codes are found by a beam search of width
    `beam`, which a decoder does not need to know, and the codebooks are refitted together by least squares
    (Babenko & Lempitsky 2014; Martinez et al. 2016).  Quantizing its own result need not give it again: the search may
    miss a sum that it would find no better than another on its way.
    """

    stages: tuple[Quantizer, ...]
    beam: int = BEAM

    idempotent = False

    def __post_init__(self) -> None:
        given = self.stages
        if not isinstance(given, tuple) or not all(isinstance(stage, Quantizer) for stage in given):
            raise PlanError(f"Residual(stages={given!r:.80}): use a tuple of quantizers")
        if not 2 <= len(given) <= MOST_STAGES:
            raise PlanError(f"Residual of {len(given)} stages: use 2 to {MOST_STAGES}")
        if type(self.beam) is not int or not 1 <= self.beam <= 256:
            raise PlanError(f"Residual(beam={self.beam!r}): use a whole number from 1 to 256")
        # Of instances, since it depends on the stages: codes move where those of any stage do.
        object.__setattr__(self, "trains_codes", any(stage.trains_codes for stage in given))
        object.__setattr__(self, "codes_by_row", all(stage.codes_by_row for stage in given))
        object.__setattr__(self, "independent_blocks", all(stage.independent_blocks for stage in given))
        object.__setattr__(self, "learns_side", any(s.learns_side or not s.trains_codes for s in given))

    def decoder(self) -> Residual:
        return Residual(tuple(stage.decoder() for stage in self.stages))

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> Residual:
        own = [None] * len(self.stages) if side is None else _numbered(side, len(self.stages))
        stages = (stage.resolve(shape, part) for stage, part in zip(self.stages, own, strict=True))
        return replace(self, stages=tuple(stages))

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        return tuple(
            spec._replace(name=f"{spec.name}_{number}")
            for number, stage in enumerate(self.stages, 1)
            for spec in stage.layout(shape)
        )

    def children(self, shape: Shape) -> Mapping[str, Child]:
        return {
            f"{name}_{number}": child
            for number, stage in enumerate(self.stages, 1)
            for name, child in stage.children(shape).items()
        }

    def with_children(self, children: Mapping[str, Quantizer]) -> Residual:
        own = _numbered(children, len(self.stages))
        stages = (stage.with_children(part) for stage, part in zip(self.stages, own, strict=True))
        return replace(self, stages=tuple(stages))

    def side_options(self, name: str, options: FitOptions) -> FitOptions:
        base, _, number = name.rpartition("_")
        return self.stages[int(number) - 1].side_options(base, options)

    def grids(self, shape: Shape) -> Iterator[Grid]:
        for stage in self.stages:
            yield from stage.grids(shape)

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        shape, left = tuple(w.shape), w
        fitted: list[dict[str, Tensor]] = []
        stages: list[Quantizer] = []
        for stage in self.stages:
            side = stage.fit(left, importance=importance, options=options, generator=generator)
            stages.append(stage.resolve(shape, side))
            stored = _stored(stages[-1], side, shape, options)
            codes = stages[-1].encode(left, stored, importance=importance)
            left = left - stages[-1].decode(codes, stored, shape)
            fitted.append(side)
        books = _codebooks(stages)
        if books:
            fitted = self._refitted(books, fitted, w, importance, options)
        return {f"{name}_{n}": value for n, side in enumerate(fitted, 1) for name, value in side.items()}

    def _refitted(
        self,
        books: Sequence[Codebook],
        fitted: list[dict[str, Tensor]],
        w: Tensor,
        importance: Tensor | None,
        options: FitOptions,
    ) -> list[dict[str, Tensor]]:
        """Codes and all codebooks in turn; the best of all rounds, since neither step is exact."""
        grid = Grid.of(tuple(w.shape), books[0].block, pad=books[0].pad)
        blocks, weights = grid.split(w), _weights(grid, w, importance)
        raw = [side["centroids"] for side in fitted]
        best, least = raw, None
        for _ in range(_ROUNDS + 1):
            pairs = zip(books, raw, strict=True)
            stored = [_stored(b, {"centroids": c}, tuple(w.shape), options)["centroids"] for b, c in pairs]
            codes = beam_search(blocks, stored, self.beam, weights)
            square = (blocks - _total(stored, codes)).double().square()
            error = float((square if weights is None else square * weights).sum())
            if least is None or error < least:
                best, least = raw, error
            raw = least_squares(blocks, codes, raw, weights)
        return [{"centroids": centroids} for centroids in best]

    def refresh(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Mapping[str, Tensor]:
        shape, left = tuple(w.shape), w
        new: dict[str, Tensor] = {}
        for number, (stage, own) in enumerate(zip(self.stages, _numbered(side, len(self.stages)), strict=True), 1):
            moved = stage.refresh(left, own, options)
            left = left - stage.decode(stage.encode(left, moved), moved, shape)
            new |= {f"{name}_{number}": value for name, value in moved.items()}
        return new

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        shape, own = tuple(w.shape), _numbered(side, len(self.stages))
        books = _codebooks(self.stages)
        if books:
            grid = Grid.of(shape, books[0].block, pad=books[0].pad)
            stored = [part["centroids"] for part in own]
            found = beam_search(grid.split(w), stored, self.beam, _weights(grid, w, importance))
            streams = zip(stored, found.T, strict=True)
            return {
                f"codes_{number}": codes.to(code_dtype(len(book))).reshape(grid.R, grid.C)
                for number, (book, codes) in enumerate(streams, 1)
            }
        left, codes = w, {}
        for number, (stage, part) in enumerate(zip(self.stages, own, strict=True), 1):
            chosen = stage.encode(left, part, importance=importance)
            left = left - stage.decode(chosen, part, shape)
            codes |= {f"{name}_{number}": stream for name, stream in chosen.items()}
        return codes

    def columns(self, shape: Shape) -> int:
        return math.lcm(*(stage.columns(shape) for stage in self.stages))

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        own = zip(self.stages, _numbered(side, len(self.stages)), strict=True)
        parts = [stage.part(shape, values, start, stop) for stage, values in own]
        sides = {f"{name}_{n}": value for n, (_, values) in enumerate(parts, 1) for name, value in values.items()}
        return Residual(tuple(stage for stage, _ in parts), self.beam), sides

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        own_side, own_codes = _numbered(side, len(self.stages)), _numbered(codes, len(self.stages))
        parts = zip(self.stages, own_codes, own_side, strict=True)
        first, *others = (stage.decode(chosen, part, shape) for stage, chosen, part in parts)
        for other in others:
            first = first + other
        return first


def _numbered(values: Mapping[str, _T], count: int) -> list[dict[str, _T]]:
    """What belongs to each of `count` stages, by the names it has there."""
    own: list[dict[str, _T]] = [{} for _ in range(count)]
    for name, value in values.items():
        base, _, number = name.rpartition("_")
        own[int(number) - 1][base] = value
    return own


def _stored(recipe: Quantizer, side: Mapping[str, Tensor], shape: Shape, options: FitOptions) -> dict[str, Tensor]:
    """Side tensors as the file will give them back."""
    return {
        name: quantize_side(child.recipe, side[name], recipe.side_options(name, options)).decode()
        for name, child in recipe.children(shape).items()
    }


def _codebooks(stages: Sequence[Quantizer]) -> list[Codebook]:
    """The stages, if they are all codebooks of one block; else none."""
    same = {(s.block, s.pad) if isinstance(s, Codebook) else None for s in stages}
    return [cast(Codebook, stage) for stage in stages] if len(same) == 1 and None not in same else []


def _weights(grid: Grid, w: Tensor, importance: Tensor | None) -> Tensor | None:
    """Weights of squared errors by block; None where all are one, whose sums would round otherwise."""
    weights = block_weights(grid, w, importance)
    return None if weights is None or bool((weights == 1).all()) else weights


def _total(codebooks: Sequence[Tensor], codes: Tensor) -> Tensor:
    """(n, d) sums of the chosen codewords."""
    return torch.stack([book[codes[:, m]] for m, book in enumerate(codebooks)]).sum(0)
