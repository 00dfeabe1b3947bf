"""Rate-aware encoding under a memoryless code: each symbol costs what its frequency says, wherever it is.

What theory calls an entropy-constrained quantizer: codes, their bits and the points that they stand for, in turn, until
squared error + λ · bits no longer falls (Chou, Lookabaugh & Gray 1989).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from bitbook.blocks import Grid
from bitbook.quantizer import FitOptions, Price, Quantized, Quantizer, StreamSpec, quantize, quantize_side
from bitbook.scalar.ecsq import ECSQ
from bitbook.vector.codebook import Codebook

_SETTLED = 2e-5  # of the sum by which a round must improve to be followed by another


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Bits of each code by how often it occurs: `table[code + offset]`; rarer ones than any cost as the rarest."""

    table: Float[Tensor, " codes"]
    offset: int
    ordered: bool
    bits: float
    """Of the whole stream, as it was counted."""

    def __call__(self, codes: Int[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        return self.table[(codes.long() + self.offset).clamp(0, len(self.table) - 1)]

    @property
    def symbols(self) -> Float[Tensor, " codes"] | None:
        return None if self.ordered else self.table

    def columns(self, start: int, stop: int) -> Frequencies:
        """The same: places make no difference."""
        return self


def frequencies(spec: StreamSpec, codes: Int[Tensor, "rows cols"]) -> Frequencies:
    """Count a stream's codes; of numbers around zero, a code and its negative alike."""
    ordered = spec.alphabet is None or spec.centre > 0
    flat = codes.reshape(-1).long()
    offset = max(-int(flat.min()), int(flat.max())) if spec.alphabet is None else 0
    counts = torch.bincount(
        flat + offset, minlength=2 * offset + 1 if spec.alphabet is None else spec.alphabet
    ).double()
    if spec.alphabet is None:
        counts = (counts + counts.flip(0)) / 2
    # Half an occurrence more, so that codes which a round emptied may come back.
    bits = -torch.log2((counts + 0.5) / (counts + 0.5).sum())
    return Frequencies(bits.float(), offset, ordered, float((counts * bits).sum()))


def quantize_memoryless(
    recipe: Quantizer,
    w: Tensor,
    lam: float,
    *,
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
    rounds: int = 20,
) -> Quantized:
    """Quantize `w` so that squared error plus `lam` · bits is small, with side tensors that follow the codes.

    Points of `ECSQ` and codewords of `Codebook` move to the means of what they stand for; other recipes keep theirs.
    The best of `rounds` is returned, without codewords that nothing uses.  Raises as `quantize`, and `PlanError` where
    a recipe's codes leave no choice.
    """
    found = quantize(recipe, w, options=options, generator=generator)
    w = w.detach().float()
    best, least = found, float("inf")
    for _ in range(rounds):
        counted = {s.name: frequencies(s, found.codes[s.name]) for s in found.recipe.layout(found.shape)}
        error = float((found.decode() - w).double().square().sum())
        cost = error + lam * sum(stream.bits for stream in counted.values())
        settled = cost > least * (1 - _SETTLED)
        if cost < least:
            best, least = found, cost
        if settled:
            break
        found = _moved(found, w)
        side = {child: stored.decode() for child, stored in found.side.items()}
        found = replace(found, codes=found.recipe.encode_priced(w, side, Price(lam, counted)))
    return best.recipe.without_unused(best)


def _moved(quantized: Quantized, w: Tensor) -> Quantized:
    """The same codes with the side tensors that suit them best, stored as before."""
    recipe = quantized.recipe
    if isinstance(recipe, Codebook):
        child, value = "centroids", _means(recipe, quantized, w)
    elif isinstance(recipe, ECSQ):
        child, value = "points", _points(recipe, quantized, w)
    else:
        return quantized
    stored = quantized.side[child]
    moved = quantize_side(stored.recipe, value, recipe.child_options(FitOptions()))
    return replace(quantized, side={**quantized.side, child: moved})


def _means(recipe: Codebook, quantized: Quantized, w: Tensor) -> Tensor:
    """Mean of the blocks of each codeword; padding has no say, and a codeword without blocks stays."""
    grid = Grid.of(quantized.shape, recipe.block, pad=recipe.pad)
    blocks, weights = grid.split(w).double(), grid.split(torch.ones_like(w)).double()
    labels = quantized.codes["codes"].reshape(-1).long()
    old = quantized.side["centroids"].decode()
    mass = torch.zeros(old.shape, dtype=torch.float64).index_add_(0, labels, weights)
    sums = torch.zeros(old.shape, dtype=torch.float64).index_add_(0, labels, weights * blocks)
    return torch.where(mass > 0, (sums / mass.clamp_min(1)).float(), old)


def _points(recipe: ECSQ, quantized: Quantized, w: Tensor) -> Tensor:
    """Mean of each magnitude; the last distance, which all larger ones share, by least squares."""
    grid = Grid.of(quantized.shape, recipe.block, pad=recipe.pad)
    codes, size = grid.split(quantized.codes["codes"]), recipe.size
    blocks = grid.split(w).double() * torch.sign(codes)
    sizes = codes.abs().long()
    old = quantized.side["points"].decode()
    shape = (len(codes), size + 1)
    inside = sizes.clamp_max(size)
    below = (sizes < size).double()
    mass = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, inside, below)[:, 1:]
    sums = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, inside, below * blocks)[:, 1:]
    points = torch.where(mass > 0, (sums / mass.clamp_min(1)).float(), old)
    before = points[:, -2:-1] if size > 1 else torch.zeros_like(points)
    beyond = (sizes - size + 1).clamp_min(0).double()
    square = beyond.square().sum(1, keepdim=True)
    distance = (beyond * (blocks - before)).sum(1, keepdim=True) / square.clamp_min(1)
    last = torch.where((square > 0) & (distance > 0), before + distance.float(), old[:, -1:])
    return torch.cat([points[:, :-1], torch.maximum(last, before)], 1)
