"""The codeword that costs each block least, squared error plus bits, fast enough for every step of a training."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitbook.scalar.kernels import serve

_CHUNK = 1 << 20  # distances that torch holds at once
_LANES = 64  # blocks that are compared with a codeword at a time: a few vector registers


def cheapest(
    blocks: Float[Tensor, "n d"],
    codewords: Float[Tensor, "k d"],
    cost: Float[Tensor, " k"],
    idle: int,
    idle_cost: Float[Tensor, " n"],
) -> Int[Tensor, " n"]:
    """The codeword with the least `|x - c|² + cost`, ties to the lowest index; the `idle` one costs each block its own.

    One pass where blocks lie in a CPU's memory, else chunks of distances; the two may differ in ties up to rounding.
    """
    offset = codewords.square().sum(1) + cost
    idle_cost = idle_cost + codewords[idle].square().sum()
    if serve(blocks):
        labels = torch.empty(len(blocks), dtype=torch.int64)
        arrays = (x.detach().contiguous().numpy() for x in (blocks, codewords, offset, idle_cost))
        _loop()(*arrays, idle, labels.numpy())
        return labels
    labels = []
    step = max(_CHUNK // len(codewords), 1)
    for part, own in zip(blocks.split(step), idle_cost.split(step), strict=True):
        total = offset - 2 * part @ codewords.T
        total[:, idle] += own - offset[idle]
        labels.append(total.argmin(1))
    return torch.cat(labels)


@functools.cache
def _loop() -> Any:
    from numba import njit  # whoever calls has asked `serve`

    compile: Any = njit(nogil=True, cache=True, fastmath={"contract", "nsz", "nnan"})
    return compile(_cheapest)


def _cheapest(blocks, codewords, offset, idle_cost, idle, labels):
    n, d = blocks.shape
    k = len(codewords)
    wide = (d + 3) // 4 * 4
    c = np.zeros((k, wide), np.float32)
    c[:, :d] = np.float32(-2) * codewords
    x = np.zeros((wide, _LANES), np.float32)
    own, best = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    total = np.zeros(_LANES, np.float32)
    winner = np.zeros(_LANES, np.int32)

    def quad(j, q, p):
        return (c[j, q] * x[q, p] + c[j, q + 1] * x[q + 1, p]) + (c[j, q + 2] * x[q + 2, p] + c[j, q + 3] * x[q + 3, p])

    for start in range(0, n, _LANES):
        count = min(_LANES, n - start)
        for p in range(count):
            own[p] = idle_cost[start + p] - offset[idle]
            for q in range(d):
                x[q, p] = blocks[start + p, q]
        best[:] = np.inf
        for j in range(k):
            base, index = offset[j], np.int32(j)
            special = np.float32(1) if j == idle else np.float32(0)
            for q in range(0, wide - 4, 4):
                for p in range(_LANES):
                    total[p] = quad(j, q, p) + (total[p] if q > 0 else np.float32(0))
            for p in range(_LANES):
                value = quad(j, wide - 4, p) + (base + special * own[p]) + (total[p] if wide > 4 else np.float32(0))
                less = value < best[p]
                winner[p] = index if less else winner[p]
                best[p] = value if less else best[p]
        for p in range(count):
            labels[start + p] = winner[p]
