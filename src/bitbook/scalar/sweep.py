"""Error feedback over levels in an order: a batch of columns in one compiled loop, each row by itself.

What `Parts` does column by column for `ECSQ` and symmetric `Uniform`, several hundred times faster under a price.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Tensor

from bitbook.blocks import Grid
from bitbook.compiling import compiler
from bitbook.feedback.columns import BatchEncoder
from bitbook.quantizer import LARGEST_CODE, CodeBits, Price, code_dtype
from bitbook.rate.rates import Rates
from bitbook.scalar.kernels import serve


class Sweep(BatchEncoder):
    """Chooses signed whole numbers, each magnitude with its point; points beyond the last go on at its distance.

    Args:
        grid: blocks that share points.
        points: ascending, `(blocks, magnitudes)`, each block's ladder without its zero.
        limit: the largest magnitude; the codes are shifted by it to start from zero. None: no bound, no shift.
        dead_zone: share of the first point up to which a target becomes zero, without a price; None rounds to even.
        price: λ and the rates of the stream, or None.
    """

    def __init__(
        self,
        grid: Grid,
        points: F32[Tensor, "blocks magnitudes"],
        limit: int | None,
        dead_zone: float | None,
        price: Price | None,
    ) -> None:
        self.grid, self.points, self.limit, self.dead_zone = grid, points.contiguous(), limit, dead_zone
        self.lam = 0.0 if price is None else price.lam
        self.priced = price is not None
        rates = None if price is None else price.bits["codes"]
        if isinstance(rates, Rates) and rates.nonzero is not None:
            self.nonzero, self.table, self.slope = rates.nonzero.contiguous(), rates.table.contiguous(), rates.slope
        else:
            self.nonzero, self.table, self.slope = torch.zeros(1, 1), torch.zeros(1), 0.0
        self._codes = torch.zeros(grid.rows, grid.cols, dtype=torch.int32)

    @staticmethod
    def serves(w: Tensor, price: Price | None) -> bool:
        """Whether the loop can take `w`, and such a price."""
        return serve(w) and (price is None or _ordered(price.bits["codes"]))

    def choose_batch(
        self,
        w: F64[Tensor, "groups rows n"],
        carried: F64[Tensor, "groups rows n"],
        root: F64[Tensor, "groups n n"],
        parts: list[tuple[int, int]],
    ) -> F64[Tensor, "groups rows n"]:
        values = torch.empty(w.shape, dtype=torch.float64)
        columns = np.array([start for start, _ in parts], np.int64)
        _loop()(
            w.contiguous().numpy(), carried.contiguous().numpy(), root.mT.contiguous().numpy(), columns,
            self.points.numpy(), self.grid.r, self.grid.c, self.grid.C,
            LARGEST_CODE if self.limit is None else self.limit,
            np.float32(self.dead_zone or 0.5), self.dead_zone is None,
            self.lam, self.priced, self.nonzero.numpy(), self.table.numpy(), self.slope,
            self._codes.numpy(), values.numpy(),
        )  # fmt: skip
        return values

    def codes(self) -> dict[str, Tensor]:
        shift, alphabet = (0, None) if self.limit is None else (self.limit, 2 * self.limit + 1)
        return {"codes": (self._codes + shift).to(code_dtype(alphabet))}


def _ordered(bits: CodeBits) -> bool:
    return isinstance(bits, Rates) and bits.nonzero is not None


@functools.cache
def _loop() -> Any:
    compile = compiler()
    assert compile is not None  # whoever calls has asked `serves`
    return compile(_sweep)


def _sweep(
    w, carried, root, columns, points, r, c, across, limit, dead_zone, even, lam, priced, nonzero, table, slope, codes,
    values,
):  # fmt: skip
    """Each row from its first column to its last; `root[g, k, l]` is R_lk."""
    groups, rows, n = w.shape
    count, most = points.shape[1], len(table)
    half = np.float32(0.5)
    errors = np.empty(n, np.float64)
    for g in range(groups):
        for i in range(rows):
            row = g * rows + i
            for k in range(n):
                fed = carried[g, i, k]
                for l in range(k):  # noqa: E741
                    fed += errors[l] * root[g, k, l]
                x = np.float32(w[g, i, k] - fed / root[g, k, k])
                p = points[row // r * across + columns[k] // c]
                m = abs(x)
                last = p[count - 1]
                distance = last - p[count - 2] if count > 1 else last
                q = 0
                if even:
                    if last > 0:
                        q = int(min(np.rint(m / last), np.float32(1 << 30)))
                else:
                    for j in range(count):
                        middle = (half if priced else dead_zone) * p[0] if j == 0 else (p[j - 1] + p[j]) * half
                        if p[j] > 0 and m > middle:
                            q += 1
                    if distance > 0 and m > last:
                        steps = (m - last) / distance - half
                        if steps > 0:
                            q += int(min(np.ceil(steps), np.float32(1 << 30)))
                q = min(q, limit)
                best, value, least = 0, np.float32(0), np.inf
                for step in range(4 if priced else 1):
                    size = 0 if step == 3 else max(q - step, 0)
                    if size == 0:
                        v = np.float32(0)
                    elif size <= count:
                        v = p[size - 1]
                    else:
                        v = last + np.float32(size - count) * distance
                    cost = 0.0
                    if priced:
                        away = root[g, k, k] * (np.float64(m) - np.float64(v))
                        cost = away * away
                        if size > 0:
                            bits = nonzero[row, columns[k]] + table[min(size, most) - 1] + slope * max(size - most, 0)
                            cost += lam * bits
                    if cost < least:
                        best, value, least = size, v, cost
                if x < 0:
                    best, value = -best, -value
                codes[row, columns[k]] = best
                values[g, i, k] = value if best != 0 else 0.0
                errors[k] = values[g, i, k] - w[g, i, k]
