"""The loops of native.c that serve where there is no C compiler, for numba: the layout, and products with levels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitbook.compiling import compiler

LANES = 16


@dataclass(frozen=True)
class Loops:
    """Compiled; arrays are those of `packing.py`."""

    pack: Any
    unpack: Any
    levels_linear: Any


@functools.cache
def loops() -> Loops | None:
    """The loops, or None where numba is missing."""
    compile = compiler()
    return None if compile is None else Loops(compile(_pack), compile(_unpack), compile(_levels_linear))


def _pack(codes, low, bits, words):
    """Codes (rows, cols), less `low`, to words (row blocks, words, lanes) of zeros."""
    for r in range(codes.shape[0]):
        waiting, count, at = np.uint64(0), 0, 0
        for j in range(codes.shape[1]):
            waiting |= np.uint64(np.int64(codes[r, j]) - low) << np.uint64(count)
            count += bits
            if count >= 32:
                words[r // LANES, at, r % LANES] = np.uint32(waiting & np.uint64(0xFFFFFFFF))
                waiting >>= np.uint64(32)
                count -= 32
                at += 1
        if count:
            words[r // LANES, at, r % LANES] = np.uint32(waiting & np.uint64(0xFFFFFFFF))


def _unpack(words, start, low, bits, codes):
    """Rows from `start` on of what `_pack` made."""
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for r in range(codes.shape[0]):
        block, lane = divmod(start + r, LANES)
        waiting, count, at = np.uint64(0), 0, 0
        for j in range(codes.shape[1]):
            if count < bits:
                waiting |= np.uint64(words[block, at, lane]) << np.uint64(count)
                count += 32
                at += 1
            codes[r, j] = np.int64(waiting & mask) + low
            waiting >>= np.uint64(bits)
            count -= bits


def _levels_linear(words, levels, scales, offsets, block_rows, block_cols, bits, rows, x, y):
    """Product: y (batch, rows) += x (batch, cols) · wᵀ; scales and offsets are (row blocks, col blocks)."""
    batch, cols = x.shape
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    row = np.empty(cols, np.float32)
    for r in range(rows):
        block, lane = divmod(r, LANES)
        waiting, count, at = np.uint64(0), 0, 0
        for j in range(cols):
            if count < bits:
                waiting |= np.uint64(words[block, at, lane]) << np.uint64(count)
                count += 32
                at += 1
            scale = scales[r // block_rows, j // block_cols]
            row[j] = (levels[waiting & mask] + offsets[r // block_rows, j // block_cols]) * scale
            waiting >>= np.uint64(bits)
            count -= bits
        for n in range(batch):
            sums = np.zeros(8, np.float32)  # sums that do not wait for each other
            whole = cols - cols % 8
            for j in range(0, whole, 8):
                for k in range(8):
                    sums[k] += row[j + k] * x[n, j + k]
            total = np.float32(0)
            for k in range(8):
                total += sums[k]
            for j in range(whole, cols):
                total += row[j] * x[n, j]
            y[n, r] += total
