"""What codes would cost: bits of each symbol in its context, counted from the codes as they are.

    codes ──density of its row × density of its column──► a class for each place ──counts──► bits (class × magnitude)

A coder with contexts does better by some percent; this is close enough to steer by, and differentiable in the codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitbook.quantizer import StreamSpec

_CLASSES = 16
_MOST_MAGNITUDES = 15  # with bits of their own; larger ones go on at a slope
_STRENGTH = 0.5  # of the mean, in elements, in the density of a row or column
_PRIOR = 0.3  # counts that every class has to begin with, shared out as the whole stream's


@dataclass(frozen=True, eq=False)
class Rates:
    """Bits of the codes of one stream; called with codes on its grid, it gives the bits of each."""

    spec: StreamSpec
    classes: Int[Tensor, "rows cols"]
    table: Float[Tensor, "classes symbols"]
    """Symbols are magnitudes, the sign's bit included, or, of a stream without an order, the codes themselves."""
    slope: float
    """Bits for each step beyond the table."""

    def __call__(self, codes: Int[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        symbols = _symbols(self.spec, codes)
        last = self.table.shape[1] - 1
        bits = self.table[self.classes, symbols.clamp_max(last)]
        return bits + self.slope * (symbols - last).clamp_min(0)

    @property
    def symbols(self) -> Float[Tensor, " alphabet"] | None:
        """Bits of each symbol, where codes have no order."""
        return None if _ordered(self.spec) else self.table[0]

    def total(self, codes: Int[Tensor, "rows cols"]) -> float:
        """Bits of all codes."""
        return self(codes).sum(dtype=torch.float64).item()


def fit_rates(spec: StreamSpec, codes: Int[Tensor, "rows cols"]) -> Rates:
    """Count the codes of a stream: ordered ones in classes of expected density, others by themselves."""
    symbols = _symbols(spec, codes)
    if not _ordered(spec):
        assert spec.alphabet is not None  # what has no alphabet has an order
        counts = torch.bincount(symbols.flatten(), minlength=spec.alphabet).double() + 0.5
        return Rates(spec, torch.zeros_like(symbols), -torch.log2(counts / counts.sum())[None].float(), 0.0)
    classes = _density_classes(symbols > 0)
    largest = min(max(int(symbols.max()) if symbols.numel() else 0, 1), _MOST_MAGNITUDES)
    within = symbols.clamp_max(largest)
    counts = torch.bincount((classes * (largest + 1) + within).flatten(), minlength=_CLASSES * (largest + 1))
    counts = counts.reshape(_CLASSES, largest + 1).double()
    zero, nonzero = _smoothed_zeros(counts)
    size = counts[:, 1:].sum(0) + 0.5 ** torch.arange(1, largest + 1)
    size = torch.cummin(size, 0).values  # a larger magnitude never costs less
    sizes = -torch.log2(size / size.sum())
    table = torch.cat([zero[:, None], nonzero[:, None] + 1 + sizes[None]], 1)
    slope = float((sizes[-1] - sizes[0]) / (largest - 1)) if largest > 1 else 1.0
    return Rates(spec, classes, table.float(), max(slope, 1.0))


def _smoothed_zeros(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of a zero and of anything else in each class, falling along the classes' order of density."""
    share = (counts[:, 1:].sum() + 0.5) / (counts.sum() + 1)
    occupied = counts.sum(1)
    expected = _CLASSES_DENSITY.clamp(1e-6, 0.98)
    p = (counts[:, 1:].sum(1) + _PRIOR * expected) / (occupied + _PRIOR)
    p = torch.cummax(torch.where(occupied > 0, p, torch.minimum(expected, share)), 0).values
    return -torch.log2(1 - p), -torch.log2(p)


_CLASSES_DENSITY = torch.logspace(-5.0, math.log10(0.9), _CLASSES, dtype=torch.float64)


def _density_classes(nonzero: Tensor) -> Int[Tensor, "rows cols"]:
    """Bins of the density that row and column, were they independent, give each place; its own code left out."""
    rows, cols = nonzero.shape
    own = nonzero.float()
    mean = (own.sum() + 0.5) / (own.numel() + 1)
    row = (own.sum(1, keepdim=True) - own + _STRENGTH * mean) / (cols - 1 + _STRENGTH)
    column = (own.sum(0, keepdim=True) - own + _STRENGTH * mean) / (rows - 1 + _STRENGTH)
    expected = row * column / mean
    first, last = math.log10(_CLASSES_DENSITY[0]), math.log10(_CLASSES_DENSITY[-1])
    bins = (expected.log10_() - first).mul_((_CLASSES - 1) / (last - first)).round_()
    return bins.clamp_(0, _CLASSES - 1).long()


def _ordered(spec: StreamSpec) -> bool:
    return spec.alphabet is None or spec.centre > 0


def _symbols(spec: StreamSpec, codes: Tensor) -> Tensor:
    return (codes.long() - spec.centre).abs() if _ordered(spec) else codes.long()
