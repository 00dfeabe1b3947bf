"""Codebooks: vector quantization, and its fusion with scalar quantization by nesting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Generator, Tensor

from bitbook.blocks import Block, Grid, Shape, check_block
from bitbook.errors import PlanError
from bitbook.quantizer import (
    Child,
    FitOptions,
    Price,
    Quantized,
    Quantizer,
    StreamSpec,
    code_dtype,
    quantize_side,
    select_rows,
)
from bitbook.scalar.leaves import Float
from bitbook.vector.kmeans import assign, kmeans
from bitbook.vector.soft import soft_codewords

_CHUNK = 1 << 14  # blocks whose distances to all codewords are held at once


@dataclass(frozen=True, repr=False)
class Codebook(Quantizer):
    """Each block is one of `size` codewords found by k-means (Gersho & Gray 1992, ch. 10).

    `size` is a number of codewords, or a float in (0, 1]: that fraction of the number of blocks, rounded
    down, at least one.  `block` is the codeword's shape: `(1, -1)` rows, `(-1, 1)` columns, `(1, 4)`
    vectors of four inputs; codewords of single weights, `(1, 1)`, are the best of all.  `centroids` says how the
    codewords are themselves stored; anything coarser than a float is applied inside the k-means loop, so that blocks
    are assigned to the codewords as stored.

    Training keeps the assignments and moves the codewords.
    """

    size: int | float
    block: Block = (1, 4)
    centroids: Quantizer = Float()
    pad: bool = False

    trains_codes = False

    def __post_init__(self) -> None:
        check_block(self.block)
        whole = type(self.size) is int and self.size >= 1
        if not whole and not (type(self.size) is float and 0 < self.size <= 1):
            raise PlanError(f"Codebook(size={self.size!r}): use a whole number of codewords, or a fraction in (0, 1]")

    def resolve(self, shape: Shape, side: Mapping[str, Tensor] | None = None) -> Codebook:
        """A fraction becomes a number; never more codewords than blocks, or than the fit found distinct."""
        grid = Grid.of(shape, self.block, pad=self.pad)
        blocks = grid.R * grid.C
        if side is not None:
            size = len(side["centroids"])
        elif type(self.size) is int:
            size = min(self.size, max(blocks, 1))
        else:
            size = max(math.floor(blocks * self.size + 1e-9), 1)  # 0.29 · 100 is 28.999…
        return Codebook(size, self.block, self.centroids, self.pad)

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return (StreamSpec("codes", (grid.R, grid.C), self._codewords),)

    def children(self, shape: Shape) -> Mapping[str, Child]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        return {"centroids": Child(self.centroids, (self._codewords, grid.r * grid.c))}

    def child_options(self, options: FitOptions) -> FitOptions:
        """Codewords are signed like weights: the same range rule serves them."""
        return options

    def fit(
        self,
        w: Tensor,
        *,
        importance: Tensor | None = None,
        options: FitOptions = FitOptions(),
        generator: Generator | None = None,
    ) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        weights = block_weights(grid, w, importance)

        def stored(centroids: F32[Tensor, "k d"]) -> F32[Tensor, "k d"]:
            return quantize_side(self.centroids, centroids, self.child_options(options)).decode()

        centroids = kmeans(
            grid.split(w),
            self._codewords,
            weights=weights,
            restarts=options.restarts,
            iterations=options.iterations,
            project=None if self.centroids == Float() else stored,
            generator=generator,
        ).centroids
        return {"centroids": distinct_rows(centroids, stored)}

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        labels = assign(grid.split(w), side["centroids"], weights=block_weights(grid, w, importance))
        return {"codes": labels.to(code_dtype(self._codewords)).reshape(grid.R, grid.C)}

    def encode_priced(
        self, w: Tensor, side: Mapping[str, Tensor], price: Price, *, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As entropy-constrained vector quantization assigns (Chou, Lookabaugh & Gray 1989, eq. 9)."""
        bits = price.bits["codes"].symbols
        if bits is None:
            raise PlanError(f"{self!r}: its codes have no order, so that a price must name each symbol's bits")
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        weights, centroids = block_weights(grid, w, importance), side["centroids"]
        labels = []
        for i in range(0, grid.R * grid.C, _CHUNK):
            blocks = grid.split(w)[i : i + _CHUNK]
            scale = torch.ones_like(blocks) if weights is None else weights[i : i + _CHUNK]
            # Σ w (x - c)² without the term that no choice changes
            error = scale @ centroids.square().T - 2 * (scale * blocks) @ centroids.T
            labels.append((error + price.lam * bits).argmin(1))
        codes = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long)
        return {"codes": codes.to(code_dtype(self._codewords)).reshape(grid.R, grid.C)}

    def columns(self, shape: Shape) -> int:
        return Grid.of(shape, self.block, pad=self.pad).c

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        grid = Grid.of(shape, self.block, pad=self.pad)
        if grid.C == 1 and grid.cols > 1:
            return super().part(shape, side, start, stop)
        return replace(self, block=(self.block[0], grid.c)), side

    def encode_part(
        self, w: Tensor, side: Mapping[str, Tensor], metric: F64[Tensor, "groups c c"], price: Price | None = None
    ) -> dict[str, Tensor]:
        """Nearest in the metric, `e M eᵀ` with all of M: plainly nearest after both were multiplied by its root."""
        if len(metric) > 1 or w.shape[1] == 1:  # rows of a block may be of different groups
            return super().encode_part(w, side, metric, price)
        own = metric[0] if price is not None else metric[0] / metric[0].diagonal().mean()
        root = torch.linalg.cholesky(own).float()
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        beyond = grid.c - len(root)  # padding, which weighs nothing
        turned = side["centroids"].reshape(-1, grid.r, grid.c) @ F.pad(root, (0, beyond, 0, beyond))
        turned = {"centroids": turned.reshape(side["centroids"].shape)}
        return self.encode(w @ root, turned) if price is None else self.encode_priced(w @ root, turned, price)

    def recentre(
        self, w: Tensor, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], *, importance: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Codewords at the weighted means of their blocks; padding has no say, one without blocks stays."""
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        weights = grid.split(torch.ones_like(w) if importance is None else importance).double()
        labels, before = codes["codes"].reshape(-1).long(), side["centroids"]
        mass = torch.zeros(before.shape, dtype=torch.float64).index_add_(0, labels, weights)
        sums = torch.zeros_like(mass).index_add_(0, labels, weights * grid.split(w).double())
        return {"centroids": torch.where(mass > 0, (sums / mass.clamp_min(1e-30)).float(), before)}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        grid = Grid.of(shape, self.block, pad=self.pad)
        labels = codes["codes"].reshape(-1).long()
        return grid.join(side["centroids"].index_select(0, labels), shape)

    def soft(self, w: Tensor, side: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The attention-weighted mean of the codewords (DKM, Cho et al. 2022)."""
        grid = Grid.of(tuple(w.shape), self.block, pad=self.pad)
        mixed = soft_codewords(grid.split(w), side["centroids"], temperature, block_weights(grid, w, None))
        return grid.join(mixed, tuple(w.shape))

    def without_unused(self, quantized: Quantized) -> Quantized:
        """Drop codewords without blocks, and renumber the rest; where their storage leaves no row out, keep all."""
        labels = quantized.codes["codes"]
        used, renumbered = torch.unique(labels, return_inverse=True)
        if len(used) == self._codewords:
            return quantized
        side = select_rows(quantized.side["centroids"], used.long())
        if side is None:
            return quantized
        recipe = Codebook(len(used), self.block, side.recipe, self.pad)
        codes = renumbered.to(code_dtype(len(used)))
        return Quantized(recipe, quantized.shape, {"codes": codes}, {"centroids": side})

    @property
    def _codewords(self) -> int:
        if type(self.size) is not int:
            raise PlanError(f"{self!r} needs a shape to become a number of codewords; call resolve(shape) first")
        return self.size


def block_weights(grid: Grid, w: Tensor, importance: Tensor | None) -> F32[Tensor, "blocks size"] | None:
    """Weights of squared errors by block; padding weighs nothing, since decode drops it."""
    if importance is None and not grid.padded:
        return None
    return grid.split(torch.ones_like(w) if importance is None else importance)


def distinct_rows(centroids: F32[Tensor, "k d"], stored: Callable[[Tensor], Tensor]) -> F32[Tensor, "k d"]:
    """Drop centroids that come back from storage as duplicates: their codes would be wasted.

    Dropping one may move a fitted scale and so create new duplicates, hence the loop.
    """
    while True:
        values, label = torch.unique(stored(centroids), dim=0, return_inverse=True)
        if len(values) == len(centroids):
            return centroids
        positions = torch.arange(len(centroids), device=centroids.device)
        first = torch.full((len(values),), len(centroids), device=centroids.device)
        centroids = centroids[first.scatter_reduce(0, label, positions, "amin").sort().values]
