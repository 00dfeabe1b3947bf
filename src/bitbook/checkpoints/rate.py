"""The step at which a tensor takes a given number of bits per weight, without data.

Every tensor gets the same bits.  Without data nobody knows which tensors matter, and their scales say nothing: a
factor moves freely between a layer and the normalisation before it.  Equal bits are blind to scale.  So would be equal
error relative to a tensor's power, the other choice that can be defended; at high rate it would save half the log₂ of
the arithmetic over the geometric mean of `2^(2h) / σ²` over tensors, nothing where their distributions are of one
shape.  But there a few outliers, which raise the power, would coarsen all other weights, and no tensor's step were
known before all others had been read.

    weights ─► counts of their bfloat16 values ─► entropy at any step ─► step ─► codes ─► bytes, really
"""

from __future__ import annotations

import numpy as np
import torch

from bitbook.checkpoints.slabs import ELEMENTS
from bitbook.checkpoints.source import Stored
from bitbook.errors import PlanError

LEAST_BITS, MOST_BITS = 0.05, 16.0
_MOST_SYMBOLS = 4000  # a little fewer than what `Rans` has tables for
_TABLE = 16  # bits of a table for each symbol, about
_PATTERNS = 1 << 16  # of bfloat16


class Histogram:
    """How often each value occurs, to bfloat16's accuracy: exact for bfloat16 weights."""

    def __init__(self, patterns: np.ndarray):
        values = torch.arange(_PATTERNS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().numpy()
        (present,) = patterns.nonzero()
        order = present[np.argsort(values[present], kind="stable")]
        self.values, self.counts = values[order], patterns[order]
        self.total = int(patterns.sum())
        self.power = float((self.counts * self.values.astype(np.float64) ** 2).sum())

    @classmethod
    def of(cls, stored: Stored) -> Histogram:
        """Count a tensor on disk; raises `WeightError` where a value is not finite."""
        counts = torch.zeros(_PATTERNS, dtype=torch.int64)
        for start in range(0, stored.numel, ELEMENTS):
            w = stored.floats(start, min(start + ELEMENTS, stored.numel))
            patterns = w.bfloat16().view(torch.int16).long() & _PATTERNS - 1
            counts += torch.bincount(patterns, minlength=_PATTERNS)
        return cls(counts.numpy())

    def bits(self, step: float) -> tuple[float, int]:
        """Bits per weight of `ECSQ()` with this step at its entropy, with a table; and the number of its symbols."""
        codes = np.copysign(np.ceil(np.abs(self.values) / np.float32(step) - np.float32(0.5)), self.values)
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        counts = np.add.reduceat(self.counts, starts)
        entropy = -(counts * np.log2(counts / self.total)).sum() / self.total
        return float(entropy + _TABLE * len(counts) / self.total), len(counts)


def step_for(histogram: Histogram, bits: float) -> float:
    """The smallest step, a bfloat16 number, at which a tensor takes no more than `bits` per weight."""
    check_bits(bits)
    if not histogram.power:
        return 1.0
    rms = (histogram.power / histogram.total) ** 0.5
    low, high = _pattern(rms * 2**-16), _pattern(rms * 2**8)
    while high - low > 1:
        middle = (low + high) // 2
        needed, symbols = histogram.bits(_value(middle))
        low, high = (low, middle) if needed <= bits and symbols <= _MOST_SYMBOLS else (middle, high)
    return _value(high)


def corrected(step: float, excess: float) -> float:
    """The step for a file that had `excess` bits per weight too many: another bfloat16 number, if that can be."""
    moved = _pattern(step * 2.0**excess)
    same = _pattern(step)
    return _value(max(moved if moved != same else same + (1 if excess > 0 else -1), 1))


def check_bits(bits: float) -> None:
    """Raise `PlanError` unless `bits` per weight can be aimed at."""
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise PlanError(f"{bits} bits per weight: use a number from {LEAST_BITS} to {MOST_BITS:g}")


def _pattern(value: float) -> int:
    """The place of a positive number among the bfloat16 numbers."""
    return int(torch.tensor(value).clamp(1e-37, 1e37).bfloat16().view(torch.int16))


def _value(pattern: int) -> float:
    return float(torch.tensor(pattern, dtype=torch.int16).view(torch.bfloat16))
