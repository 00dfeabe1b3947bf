"""Error feedback along a path: a batch of columns in one compiled loop, each column's path from where the last ended.

What `PathEncoder` does column by column for levels on a ladder, several times faster.  The two differ where sums of
errors round otherwise, in the last bit of a float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from jaxtyping import Int
from torch import Tensor

from bitbook.compiling import compiler
from bitbook.feedback.columns import BatchEncoder
from bitbook.scalar.kernels import serve
from bitbook.trellis import viterbi
from bitbook.trellis.machine import next_states, previous
from bitbook.trellis.viterbi import Ladder


class LadderPath(BatchEncoder):
    """Chooses the levels of a path down the columns.

    Args:
        states: of the machine.
        steps: of each weight, `(rows, cols)`.
        ladder: what levels stand for in steps, and what they cost.
        priced: whether squared errors are set against a price, so that their scale matters.
    """

    ordered = True

    def __init__(self, states: int, steps: F32[Tensor, "rows cols"], ladder: Ladder, *, priced: bool) -> None:
        self.states, self.ladder, self.priced = states, ladder, priced
        self.steps = steps.detach().float().contiguous()
        self._state = 0
        self._levels = torch.zeros(steps.shape[1], len(steps), dtype=torch.int32)

    @staticmethod
    def serves(w: Tensor) -> bool:
        """Whether the loop can take `w`: a path is searched column by column, as a whole."""
        return serve(w) and w.dim() > 0 and w.shape[0] <= viterbi.SEGMENT

    def choose_batch(
        self,
        w: F64[Tensor, "groups rows n"],
        carried: F64[Tensor, "groups rows n"],
        root: F64[Tensor, "groups n n"],
        parts: list[tuple[int, int]],
    ) -> F64[Tensor, "groups rows n"]:
        values = torch.empty(w.shape, dtype=torch.float64)
        ladder = self.ladder
        self._state = _sweep(
            w.contiguous().numpy(), carried.contiguous().numpy(), root.mT.contiguous().numpy(),
            np.array([start for start, _ in parts], np.int64), self.steps.numpy(),
            np.ascontiguousarray(ladder.values, np.float64), np.ascontiguousarray(ladder.bits, np.float64),
            float(ladder.slope), float(ladder.lam), self.priced,
            previous(self.states), next_states(self.states), self._state, self._levels.numpy(), values.numpy(),
        )  # fmt: skip
        return values

    def codes(self) -> dict[str, Int[Tensor, "cols rows"]]:
        return {"codes": self._levels}


_compile: Any = compiler() or (lambda loop: loop)
_on_ladder, _search, _walk = _compile(viterbi._on_ladder), _compile(viterbi._search), _compile(viterbi._walk)


@_compile
def _sweep(
    w, carried, root, columns, steps, values, bits, slope, lam, priced, into, after, state, levels, decoded
):  # fmt: skip
    """`root[g, k, l]` is R_lk."""
    groups, rows, n = w.shape
    size = len(values) // 2
    errors = np.zeros((n, groups * rows))
    scaled, weight = np.empty(groups * rows), np.empty(groups * rows)
    fed = np.empty(rows)
    for k in range(n):
        column = columns[k]
        mean = 0.0
        for g in range(groups):
            mean += root[g, k, k] * root[g, k, k] / groups
        for g in range(groups):
            for i in range(rows):
                fed[i] = carried[g, i, k]
            for l in range(k):  # noqa: E741
                share = root[g, k, l]
                for i in range(rows):
                    fed[i] += errors[l, g * rows + i] * share
            square = root[g, k, k] * root[g, k, k]
            if not priced:
                square /= mean
            for i in range(rows):
                row = g * rows + i
                step = np.float64(steps[row, column])
                target = np.float64(np.float32(w[g, i, k] - fed[i] / root[g, k, k]))
                scaled[row] = target / step if step > 0 else 0.0
                weight[row] = square * (step * step)
        cost, chosen = _on_ladder(scaled, weight, values, bits, slope, lam)
        found = _search(cost, chosen, into, state)
        state = _walk(found, after, state)
        for g in range(groups):
            for i in range(rows):
                row = g * rows + i
                level = found[row]
                place = min(max(level, -size), size)
                value = np.float32(np.float32(values[place + size]) + np.float32(level - place))
                decoded[g, i, k] = np.float32(value * steps[row, column])
                errors[k, row] = decoded[g, i, k] - w[g, i, k]
                levels[column, row] = level
    return state
