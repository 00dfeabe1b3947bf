"""What codes would cost: bits of each symbol in its context, counted from the codes as they are.

    codes ──which are zero──► contexts.py ──► bits of a non-zero in each place ─┐
      └─────magnitudes, counted─────────────► bits of each magnitude and sign ──┴─► bits of any code in any place

A coder with contexts does a little better; this is close enough to steer by, and differentiable in the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitbook.quantizer import StreamSpec
from bitbook.rate.contexts import price_flags

_MOST_MAGNITUDES = 15  # with bits of their own; larger ones go on at a slope


@dataclass(frozen=True, eq=False)
class Rates:
    """Bits of the codes of one stream; called with codes on its grid, it gives the bits of each.

    Where codes have an order, a zero is what everything is compared with: it costs nothing, and a non-zero costs the
    bits by which the whole stream would grow.
    """

    spec: StreamSpec
    nonzero: Float[Tensor, "rows cols"] | None
    """Bits of a non-zero in each place, without its magnitude; None where codes have no order."""
    table: Float[Tensor, " symbols"]
    """Bits of the magnitudes 1, 2, …, the sign's bit included, or, of a stream without an order, of each code."""
    slope: float
    """Bits for each step beyond the table."""
    bits: float
    """Of the whole stream, as it was counted."""

    def __call__(self, codes: Int[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        if self.nonzero is None:
            return self.table[codes.long()]
        size = (codes.long() - self.spec.centre).abs()
        last = len(self.table)
        bits = self.nonzero + self.table[(size - 1).clamp(0, last - 1)] + self.slope * (size - last).clamp_min(0)
        return torch.where(size > 0, bits, 0.0)

    @property
    def symbols(self) -> Float[Tensor, " alphabet"] | None:
        """Bits of each symbol, where codes have no order."""
        return self.table if self.nonzero is None else None

    def columns(self, start: int, stop: int) -> Rates:
        """The same for a part of the grid."""
        if self.nonzero is None:
            return self
        nonzero = self.nonzero[:, start:stop]
        return replace(self, spec=self.spec._replace(grid=tuple(nonzero.shape)), nonzero=nonzero)

    def rises(self, count: int) -> Float[Tensor, " count"]:
        """Bits from the magnitude 1 to 2, from 2 to 3, and so on: `count` of them, never negative."""
        own = self.table.diff()[:count]
        return torch.cat([own, own.new_full((count - len(own),), self.slope)]).clamp_min(0)


@dataclass(frozen=True, eq=False)
class LevelRates:
    """Bits of the levels of a trellis: those of even levels among the even ones, of odd among the odd."""

    spec: StreamSpec
    table: Float[Tensor, " levels"]
    """Bits of the levels from -m to m, m odd."""
    slope: float
    """Bits for each step of two beyond the table."""
    bits: float
    """Of the whole stream, as it was counted."""

    symbols = None

    def __call__(self, codes: Int[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        level = codes.long()
        most = len(self.table) // 2
        steps = ((level.abs() - most + 1) // 2).clamp_min(0)  # of two, beyond the table
        return self.table[level - 2 * steps * level.sign() + most] + self.slope * steps

    def columns(self, start: int, stop: int) -> LevelRates:
        """The same: places make no difference."""
        return self


def fit_level_rates(spec: StreamSpec, codes: Int[Tensor, "rows cols"]) -> LevelRates:
    """Count the levels of a stream with a machine; where they lie makes no difference."""
    level = codes.long().flatten()
    size = level.abs()
    most = min(int(size.max()) if size.numel() else 0, 2 * _MOST_MAGNITUDES) | 1
    within = level.sign() * torch.where(size > most, most - (size - most) % 2, size)
    counts = torch.bincount(within + most, minlength=2 * most + 1).double()
    away = torch.arange(-most, most + 1, device=codes.device).abs()
    likely = counts + 0.5 ** (1 + away)
    parity = away % 2
    total = torch.stack([likely[parity == p].sum() for p in (0, 1)])
    table = torch.log2(total[parity]) - torch.log2(likely)
    slope = max(float((table[-2:] - table[-4:-2]).mean()) if most > 3 else 1.0, 1.0)
    rates = LevelRates(spec, table.float(), slope, 0.0)
    return replace(rates, bits=float(rates(codes).double().sum()))


def fit_rates(spec: StreamSpec, codes: Int[Tensor, "rows cols"]) -> Rates | LevelRates:
    """Count the codes of a stream: ordered ones where they lie, others, and levels of a trellis, by themselves."""
    return fit_level_rates(spec, codes) if spec.states else fit_place_rates(spec, codes)


def fit_place_rates(spec: StreamSpec, codes: Int[Tensor, "rows cols"]) -> Rates:
    """Count codes that may follow each other in any order."""
    if spec.alphabet is not None and not spec.centre:
        counts = torch.bincount(codes.long().flatten(), minlength=spec.alphabet)
        bits = -torch.log2((counts + 0.5) / (counts + 0.5).sum())
        return Rates(spec, None, bits.float(), 0.0, float((counts * bits).sum()))
    size = (codes.long() - spec.centre).abs()
    flags = price_flags(size > 0)
    largest = min(max(int(size.max()) if size.numel() else 0, 1), _MOST_MAGNITUDES)
    counts = torch.bincount(size[size > 0].clamp_max(largest), minlength=largest + 1)[1:].double()
    likely = counts + 0.5 ** torch.arange(1, largest + 1, device=codes.device)
    likely = torch.cummin(likely, 0).values  # a larger magnitude never costs less
    table = 1 - torch.log2(likely / likely.sum())
    slope = max(float((table[-1] - table[0]) / (largest - 1)) if largest > 1 else 1.0, 1.0)
    beyond = (size - largest).clamp_min(0).sum()
    bits = flags.bits + float((counts * table).sum()) + slope * float(beyond)
    return Rates(spec, flags.cost, table.float(), slope, bits)
