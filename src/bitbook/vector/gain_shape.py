"""Gain and shape: the direction of a block from a codebook of unit vectors, its length by any scalar quantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from bitbook.blocks import Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.quantizer import Child, FitOptions, Quantizer, StreamSpec, code_dtype, quantize_side
from bitbook.scalar.leaves import Float
from bitbook.vector.codebook import block_weights, distinct_rows

_CHUNK_BYTES = 32 << 20
_SMALLEST = 1e-30  # of a squared length to divide by


@dataclass(frozen=True, repr=False)
class GainShape(Quantizer):
    """`ŵ = g · s_c`: one of `size` unit vectors times a gain per block, at least zero (Gersho & Gray 1992, ch. 12.10).

    Shapes, the side tensor `centroids`, are found by spherical k-means (Dhillon & Modha 2001): blocks go to the shape
    with the largest correlation, whatever their length, and shapes move to the normalised sum of their blocks.  With an
    importance, both are the minima of the weighted squared error.  Gains are a side tensor, one per block, stored
    through `gains`: `Uniform(4, symmetric=False)`, for example.  Training keeps the codes and moves shapes and gains.
    """

    size: int
    block: Block = (1, 4)
    centroids: Quantizer = Float()
    gains: Quantizer = Float()
    pad: bool = False

    trains_codes = False

    def __post_init__(self) -> None:
        check_block(self.block)
        if type(self.size) is not int or self.size < 1:
            raise PlanError(f"GainShape(size={self.size!r}): use a whole number of shapes, at least 1")

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> GainShape:
        """Never more shapes than blocks, or than the fit found distinct."""
        grid = Grid.of(shape, self.block, pad=self.pad)
        size = len(side["centroids"]) if side is not None else min(self.size, max(grid.R * grid.C, 1))
        return replace(self, size=size)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return (StreamSpec("codes", (grid.R, grid.C), self.size),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return {
            "centroids": Child(self.centroids, (self.size, grid.r * grid.c)),
            "gains": Child(self.gains, (grid.R, grid.C)),
        }

    def side_options(self, name: str, options: FitOptions) -> FitOptions:
        """Shapes are signed like weights; gains are positive, where zero must stay zero."""
        return options if name == "centroids" else self.child_options(options)

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        x, given = grid.split(w), block_weights(grid, w, importance)
        weights = torch.ones_like(x) if given is None else given

        def stored(shapes: Tensor) -> Tensor:
            return quantize_side(self.centroids, shapes, self.side_options("centroids", options)).decode()

        best, least = x[:1], math.inf
        for _ in range(options.restarts):
            shapes, previous = _start(x, weights, self.size, generator), math.inf
            for _ in range(options.iterations + 1):
                values = stored(shapes)
                labels, gains = _correlated(x, values, weights)
                error = float((weights * (x - gains[:, None] * values[labels]).square()).double().sum())
                if error < least:
                    best, least = shapes, error
                if error >= previous:
                    break
                previous = error
                shapes = _moved(x, weights, labels, gains, shapes)
        best = distinct_rows(best, stored)
        gains = _correlated(x, stored(best), weights)[1]
        return {"centroids": best, "gains": gains.reshape(grid.R, grid.C)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest product, given the gain as stored; the first of equals."""
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        x, weights = grid.split(w), block_weights(grid, w, importance)
        shapes, gains = side["centroids"], side["gains"].reshape(-1, 1, 1).clamp_min(0)
        step = max(_CHUNK_BYTES // (4 * shapes.numel()), 1)
        labels = []
        for i in range(0, len(x), step):
            square = (x[i : i + step, None] - gains[i : i + step] * shapes).square()
            labels.append((square if weights is None else square * weights[i : i + step, None]).sum(2).argmin(1))
        return {"codes": torch.cat(labels).to(code_dtype(self.size)).reshape(grid.R, grid.C)}

    def columns(self, shape: Shape) -> int:
        return Grid.of(shape, self.block, pad=self.pad).c

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        if grid.C == 1 and grid.cols > 1:
            return super().part(shape, side, start, stop)
        own = replace(self, block=(self.block[0], grid.c))
        return own, {**side, "gains": side["gains"][:, start // grid.c, None]}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        shapes = side["centroids"].index_select(0, codes["codes"].reshape(-1).long())
        return grid.join(side["gains"].reshape(-1, 1).clamp_min(0) * shapes, shape)


def _start(x: Tensor, weights: Tensor, size: int, generator: Generator | None) -> Tensor:
    """`size` directions of blocks, drawn by their energy without repetition; a block of zeros points along all axes."""
    energy = (weights * x.square()).sum(1).double()
    # Exponential races (Efraimidis & Spirakis 2006): as multinomial, but the same whatever the scale of the weights.
    races = torch.rand(len(x), generator=generator, dtype=torch.float64).clamp_min(1e-12).log() / energy
    picks = races.nan_to_num(neginf=-torch.finfo(torch.float64).max).argsort(descending=True, stable=True)[:size]
    return _unit(x[picks])


def _unit(x: Tensor) -> Tensor:
    largest = x.abs().amax(1, keepdim=True)
    x = torch.where(largest > 0, x / largest.clamp_min(_SMALLEST), torch.ones_like(x))
    return x / x.square().sum(1, keepdim=True).sqrt()


def _correlated(x: Tensor, shapes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The shape that leaves the least of each block at its own best gain, and that gain."""
    step = max(_CHUNK_BYTES // (4 * len(shapes)), 1)
    labels = []
    for i in range(0, len(x), step):
        part = weights[i : i + step]
        correlation = ((part * x[i : i + step]) @ shapes.T).clamp_min(0)
        labels.append((correlation.square() / (part @ shapes.square().T).clamp_min(_SMALLEST)).argmax(1))
    label = torch.cat(labels)
    chosen = shapes[label]
    length = (weights * chosen.square()).sum(1).clamp_min(_SMALLEST)
    return label, ((weights * x * chosen).sum(1) / length).clamp_min(0)


def _moved(x: Tensor, weights: Tensor, labels: Tensor, gains: Tensor, shapes: Tensor) -> Tensor:
    """The best shapes for given codes and gains; a coordinate without weight, or a shape without blocks, stays."""
    gain = gains[:, None].double()
    moment = torch.zeros(shapes.shape, dtype=torch.float64).index_add_(0, labels, weights * x * gain)
    mass = torch.zeros_like(moment).index_add_(0, labels, weights * gain.square())
    return _unit(torch.where(mass > 0, moment / mass.clamp_min(1e-300), shapes.double()).float())
