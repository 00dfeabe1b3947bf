"""The inner loops of a ladder of reconstruction points on a CPU: one pass where torch needs a dozen.

They give what the torch expressions of `ecsq.py` and `rate/pricing.py` give, bit for bit; those serve elsewhere.
Arrays are `(blocks, n)`; `points` is `(blocks, points)`, each block's ladder without its zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitbook.compiling import compiler
from bitbook.scalar.kernels import serve as serve


def nearest(w: Tensor, points: Tensor, dead_zone: float) -> tuple[Tensor, Tensor]:
    """The magnitude of each weight, int32, and its signed point."""
    size, value = torch.empty(w.shape, dtype=torch.int32), torch.empty_like(w)
    _loops().nearest(_array(w), _array(points), np.float32(dead_zone), size.numpy(), value.numpy())
    return size, value


def points_gradient(w: Tensor, size: Tensor, grad: Tensor, count: int) -> Tensor:
    """The gradient of each point: the sum over the weights it stands for, signs undone; the tail joins the last two."""
    total = np.zeros((len(w), count), np.float64)
    _loops().points_gradient(_array(w), size.numpy(), _array(grad), total)
    return torch.from_numpy(total.astype(np.float32))


def add_price(w: Tensor, grad: Tensor, rungs: Tensor, first: Tensor, above: Tensor, lam: float) -> None:
    """Add `λ · sign(w) · slope` to `grad`: `first` below the first of `rungs`, beyond each of them that of `above`.

    first: `(blocks, n)`, bits per weight unit; rungs and above: `(blocks, magnitudes)`.
    """
    _loops().add_price(_array(w), grad.numpy(), _array(rungs), _array(first), _array(above), np.float32(lam))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


@dataclass(frozen=True)
class _Loops:
    nearest: Any
    points_gradient: Any
    add_price: Any


@functools.cache
def _loops() -> _Loops:
    compile = compiler()
    assert compile is not None  # whoever calls has asked `serve`
    return _Loops(*map(compile, (_nearest, _points_gradient, _add_price)))


def _nearest(w, points, dead_zone, size, value):
    blocks, n = w.shape
    count = points.shape[1]
    half = np.float32(0.5)
    for b in range(blocks):
        p = points[b]
        middles = np.empty(count, np.float32)
        table = np.zeros(count + 1, np.float32)
        for k in range(count):
            middles[k] = dead_zone * p[0] if k == 0 else (p[k - 1] + p[k]) * half
            if not p[k] > 0:
                middles[k] = np.float32(np.inf)
            table[k + 1] = p[k]
        last, distance = table[count], table[count] - table[count - 1]
        for i in range(n):
            x = w[b, i]
            m = abs(x)
            if m <= middles[0]:  # most are
                size[b, i] = 0
                value[b, i] = 0
                continue
            q = np.int32(0)
            for k in range(count):
                q += m > middles[k]
            v = table[q]
            if distance > 0 and m > last:
                steps = (m - last) / distance - half
                if steps > 0:
                    beyond = min(np.ceil(steps), np.float32(1 << 30))
                    if q < count:
                        q = np.int32(q + np.int32(beyond))
                    else:
                        v += beyond * distance
                        q = np.int32(q + np.int32(beyond))
            size[b, i] = q
            value[b, i] = -v if x < 0 and q > 0 else v  # codes know no -0.0


def _points_gradient(w, size, grad, total):
    blocks, n = w.shape
    count = total.shape[1]
    for b in range(blocks):
        for i in range(n):
            q = size[b, i]
            if q == 0:
                continue
            g = np.float64(grad[b, i]) if w[b, i] > 0 else -np.float64(grad[b, i])
            if q <= count:
                total[b, q - 1] += g
            else:  # points beyond the last go on at the last distance
                total[b, count - 1] += g * (q - count + 1)
                if count > 1:
                    total[b, count - 2] -= g * (q - count)


def _add_price(w, grad, rungs, first, above, lam):
    blocks, n = w.shape
    count = rungs.shape[1]
    for b in range(blocks):
        p, row, own, low, high = rungs[b], w[b], grad[b], first[b], above[b]
        for i in range(n):
            x = row[i]
            m = abs(x)
            slope = low[i]
            if m >= p[0]:  # few are
                for j in range(count):
                    if m >= p[j]:
                        slope = high[j]
            own[i] += np.copysign(lam * slope, x) if x != 0 else np.float32(0)
