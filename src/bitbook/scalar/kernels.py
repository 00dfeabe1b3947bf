"""The inner loops of uniform quantization on a CPU: one pass over a tensor where torch needs several.

They are the torch expressions of `uniform.py`, bit for bit; those serve on other devices, while a compiler traces,
and where numba is missing.  A training step of a small network consists of short operations, whose number counts.

Tiles are arrays `(R, r, C, c)`; what a block shares is `(R, 1, C, 1)` beside them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitbook.blocks import Grid
from bitbook.compiling import compiler

SHORTEST_RUN = 8  # neighbours that share a scale: a loop over fewer costs more than broadcasting
SMALL = 1 << 16  # elements for which torch takes few threads
MOST_THREADS = 4  # with more, several passes by all of them outrun one pass by one

_INFINITY = np.float32(np.inf)
_SIGN_SHIFT, _MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)  # of the bit pattern of a float32
_INFINITE_BITS = np.int32(0x7F800000)


def serve(w: Tensor, run: int | None = None) -> bool:
    """Whether the loops can read `w`: plain float32 on the CPU, contiguous; `run` neighbours share a scale."""
    return (
        not torch.compiler.is_compiling()
        and w.is_cpu
        and w.dtype == torch.float32
        and w.is_contiguous()
        and type(w) in (Tensor, nn.Parameter)
        and (run is None or run >= SHORTEST_RUN)
        and (size := w.numel()) > 0
        and (size <= SMALL or torch.get_num_threads() <= MOST_THREADS)
        and torch._C._get_tracing_state() is None  # as torch.jit.is_tracing
        and _compiled() is not None
    )


def minmax_scale(w: Tensor, grid: Grid, steps: int, least: float) -> Tensor:
    """`(max - min) / steps` of each block of an unpadded grid, at least `least`, `(R, C)`; NaN where one holds NaN."""
    scale = torch.empty(grid.R, grid.C)
    _loops().minmax_scale(w.detach().numpy().reshape(grid.R, grid.r, grid.C, grid.c), steps, least, scale.numpy())
    return scale


def levels(w: Tensor, scale: float, low: float, high: float, out: Tensor) -> Tensor:
    """Write `s · clip(round(w / s), low, high)` to `out`, w's shape, for one scale above zero; returns it."""
    _loops().levels(w.detach().numpy().reshape(-1), scale, low, high, out.detach().numpy().reshape(-1))
    return out


def tiled_levels(tiles: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """`s · clip(round(w / s), low - z, high - z)`, block by block; a scale of zero (or below) gives zeros."""
    out = torch.empty_like(tiles)
    _loops().tiled_levels(*_arrays(tiles, scale, zero), low, high, out.numpy())
    return out


def tiled_mask(grad: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """`grad` times one where `(low - z) · s ≤ w ≤ (high - z) · s`, else times zero."""
    out = torch.empty_like(tiles)
    _loops().tiled_mask(grad.contiguous().numpy(), *_arrays(tiles, scale, zero), low, high, out.numpy())
    return out


def bounds(scale: float, low: float, high: float) -> tuple[float, float]:
    """The float32 numbers next to `[low · scale, high · scale]`: hardtanh passes no gradient at its bounds."""
    loops = _compiled()
    return _bounds(scale, low, high) if loops is None else loops.bounds(scale, low, high)


def _arrays(tiles: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    shift = None if zero is None else zero.contiguous().numpy()
    return tiles.detach().numpy(), scale.detach().contiguous().numpy(), shift


@dataclass(frozen=True)
class _Loops:
    minmax_scale: Any
    levels: Any
    tiled_levels: Any
    tiled_mask: Any
    bounds: Any


@functools.cache
def _compiled() -> _Loops | None:
    compile = compiler()
    loops = _minmax_scale, _levels, _tiled_levels, _tiled_mask, _bounds
    return None if compile is None else _Loops(*map(compile, loops))


def _loops() -> _Loops:
    loops = _compiled()
    assert loops is not None  # whoever calls has asked `serve`
    return loops


def _minmax_scale(tiles, steps, least, scale):
    rows, height, cols, _ = tiles.shape
    bits, scale_bits = tiles.view(np.int32), scale.view(np.int32)
    for i in range(rows):
        for j in range(cols):
            # Integers in the order of the numbers, NaN beyond both infinities: unlike floats, their extremes vectorise.
            low, high = _MAGNITUDE, ~_MAGNITUDE
            for k in range(height):
                row = bits[i, k, j]
                for p in range(len(row)):
                    order = row[p] ^ ((row[p] >> _SIGN_SHIFT) & _MAGNITUDE)
                    low, high = min(low, order), max(high, order)
            if low < ~_INFINITE_BITS or high > _INFINITE_BITS:
                scale[i, j] = np.nan
                continue
            scale_bits[i, j] = high ^ ((high >> _SIGN_SHIFT) & _MAGNITUDE)
            largest = scale[i, j]
            scale_bits[i, j] = low ^ ((low >> _SIGN_SHIFT) & _MAGNITUDE)
            span = (largest - scale[i, j]) / np.float32(steps)
            scale[i, j] = np.float32(least) if span < np.float32(least) else span


def _levels(w, scale, low, high, out):
    s, least, most = np.float32(scale), np.float32(low), np.float32(high)
    for p in range(len(w)):
        step = w[p] / s
        step = least if step < least else step  # NaN stays
        step = most if step > most else step
        out[p] = (np.rint(step) + np.float32(0)) * s  # codes know no -0.0, so training sees none


def _tiled_levels(tiles, scale, zero, low, high, out):
    rows, height, cols, _ = tiles.shape
    for i in range(rows):
        for k in range(height):
            for j in range(cols):
                s = scale[i, 0, j, 0]
                divisor = np.float32(np.inf) if s <= 0 else s
                least, most = np.float32(low), np.float32(high)
                if zero is not None:
                    least, most = least - zero[i, 0, j, 0], most - zero[i, 0, j, 0]
                source, target = tiles[i, k, j], out[i, k, j]
                for p in range(len(source)):
                    step = source[p] / divisor
                    step = least if step < least else step
                    step = most if step > most else step
                    target[p] = (np.rint(step) + np.float32(0)) * s


def _tiled_mask(grad, tiles, scale, zero, low, high, out):
    rows, height, cols, _ = tiles.shape
    for i in range(rows):
        for k in range(height):
            for j in range(cols):
                s = scale[i, 0, j, 0]
                least, most = np.float32(low), np.float32(high)
                if zero is not None:
                    least, most = least - zero[i, 0, j, 0], most - zero[i, 0, j, 0]
                least, most = least * s, most * s
                source, target, slope = tiles[i, k, j], out[i, k, j], grad[i, k, j]
                for p in range(len(source)):
                    inside = np.float32(1) if (source[p] >= least) & (source[p] <= most) else np.float32(0)
                    target[p] = slope[p] * inside


def _bounds(scale, low, high):
    down, up = np.nextafter(np.float32(scale * low), -_INFINITY), np.nextafter(np.float32(scale * high), _INFINITY)
    return float(down), float(up)
