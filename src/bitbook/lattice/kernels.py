"""The search for the nearest codeword of E8P on a CPU, a vector at a time; `e8p.nearest` where numba is missing."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitbook.compiling import compiler


def serve(x: Tensor) -> bool:
    """Whether the loop can read `x`: plain float32 on the CPU."""
    return not torch.compiler.is_compiling() and x.is_cpu and x.dtype == torch.float32 and _compiled() is not None


def nearest(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As `e8p.nearest`: a pattern is looked at closely only where its best signs beat what was found before."""
    pattern, signs = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64)
    loop = _compiled()
    assert loop is not None  # whoever calls has asked `serve`
    loop(x.contiguous().numpy(), table.numpy(), pattern.numpy(), signs.numpy())
    return pattern, signs


@functools.cache
def _compiled() -> Any:
    compile = compiler()
    return None if compile is None else compile(_nearest)


def _nearest(x, table, pattern, signs):
    count = len(table)
    norms = np.zeros(count, np.float32)
    parity = np.zeros(count, np.int64)
    columns = np.zeros((8, count), np.float32)
    for k in range(count):
        total = np.float32(0)
        for i in range(8):
            norms[k] += table[k, i] * table[k, i]
            total += table[k, i]
            columns[i, k] = table[k, i]
        parity[k] = np.int64(total) % 2
    score = np.zeros(count, np.float32)
    size = np.zeros(8, np.float32)
    for n in range(len(x)):
        best = np.float32(-np.inf)
        best_pattern, best_shift, best_place = 0, 0, 8
        for shift in range(2):
            offset = np.float32(0.25) if shift == 0 else np.float32(-0.25)
            norm = np.float32(0)
            negatives = 0
            for i in range(8):
                y = x[n, i] - offset
                size[i] = abs(y)
                norm += y * y
                negatives += 1 if y < 0 else 0
            for k in range(count):
                score[k] = -norms[k] - norm
            for i in range(8):
                twice = 2 * size[i]
                for k in range(count):
                    score[k] += twice * columns[i, k]
            for k in range(count):
                value, place = score[k], 8
                if value < best:
                    continue
                if (negatives + parity[k]) % 2:
                    cost = np.float32(np.inf)
                    for i in range(8):
                        turned = size[i] * table[k, i]
                        if turned < cost:
                            cost, place = turned, i
                    value -= 4 * cost
                better = value > best
                equal = value == best and k < best_pattern  # the first pattern, as the other shift came first
                if better or equal:
                    best, best_pattern, best_shift, best_place = value, k, shift, place
        bits = 128 * best_shift
        offset = np.float32(0.25) if best_shift == 0 else np.float32(-0.25)
        for i in range(7):
            negative = x[n, i] - offset < 0
            if negative != (i == best_place):
                bits += 1 << i
        pattern[n] = best_pattern
        signs[n] = bits
