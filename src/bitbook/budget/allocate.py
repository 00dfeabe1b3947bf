"""The multiple-choice knapsack: one candidate for each tensor, the least loss that fits into a budget of bytes.

Candidates made at one price of a bit are the corner of the convex hull where every tensor's slope is that price
(Shoham & Gersho 1988).  What lies between two corners is found by dynamic programming over bytes (Kellerer, Pferschy &
Pisinger 2004, chapter 11), so that the budget is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MOST_SUMS = 1 << 19
"""Sizes that the dynamic programme tells apart; a larger budget is counted in units of several bytes, rounded up."""


class Option(NamedTuple):
    """What a candidate costs and does."""

    size: int
    """Bytes."""
    loss: float


def allocate(tensors: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """The option of each tensor with the least sum of losses whose sizes sum to `budget` at most.

    Exact where the budget is below half a million bytes; above, sizes are rounded up to whole units of the budget's
    half-millionth part.  None where not even the smallest options fit.
    """
    smallest = [min(option.size for option in options) for options in tensors]
    room = budget - sum(smallest)
    if room < 0:
        return None
    unit = -(-(room + 1) // _MOST_SUMS)
    sums = room // unit + 1
    best = np.zeros(sums)
    picks = np.zeros((len(tensors), sums), np.int16)
    for t, options in enumerate(tensors):
        reached = np.full(sums, np.inf)
        for i, option in enumerate(options):
            extra = -(-(option.size - smallest[t]) // unit)
            if extra >= sums:
                continue
            loss = best[: sums - extra] + option.loss
            better = loss < reached[extra:]
            reached[extra:][better] = loss[better]
            picks[t, extra:][better] = i
        best = reached
    chosen, at = [], sums - 1
    for t in range(len(tensors) - 1, -1, -1):
        chosen.append(int(picks[t, at]))
        at -= -(-(tensors[t][chosen[-1]].size - smallest[t]) // unit)
    return chosen[::-1]
