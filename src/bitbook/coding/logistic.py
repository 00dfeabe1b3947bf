"""Probabilities as odds, in integers: the tables of logistic mixing, the same on every platform.

Log odds are in units of 1/256 (natural logarithm), probabilities in units of 1/65536.
"""

from __future__ import annotations

import numpy as np

from bitbook.coding.compiled import compiled

UNIT = 256
"""Log odds per natural logarithm of one e-fold."""
LIMIT = 12 * UNIT - 1
_SCALE = 1 << 80
_EXPONENT = 1023 + 11  # that a float64 between 2048 and 4096 has


def _exponentials(count: int) -> list[int]:
    """`exp(i / 256) · 2^80`, rounded down, by whole numbers alone."""
    term = step = _SCALE
    for i in range(1, 30):
        term //= UNIT * i
        step += term
    values = [_SCALE]
    for _ in range(count - 1):
        values.append(values[-1] * step // _SCALE)
    return values


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    exponentials = _exponentials(40 * UNIT)
    squash = np.empty(2 * LIMIT + 1, np.int32)
    for x in range(LIMIT + 1):
        one = (exponentials[x] << 16) // (_SCALE + exponentials[x])
        squash[LIMIT + x] = min(max(one, 1), 65535)
        squash[LIMIT - x] = 65536 - squash[LIMIT + x]
    stretch = np.searchsorted(squash, np.arange(65536), side="left").astype(np.int32) - LIMIT
    stretch = np.clip(stretch, -LIMIT, LIMIT)
    logs = np.empty(2048 + 64, np.int32)
    x = 7 * UNIT
    for mantissa in range(2048, 4096):
        while exponentials[x + 1] <= mantissa * _SCALE:
            x += 1
        logs[mantissa - 2048] = x
    x = 0
    for shift in range(64):
        while x + 1 < len(exponentials) and exponentials[x + 1] <= _SCALE << min(shift, 57):
            x += 1
        logs[2048 + shift] = x
    return squash, stretch.astype(np.int32), logs


SQUASH, STRETCH, _LOGS = _tables()


@compiled
def squash(x):
    """The probability (in 1/65536, never 0 or 1) whose log odds are x / 256."""
    return np.int64(SQUASH[min(max(x, -LIMIT), LIMIT) + LIMIT])


@compiled
def log(x):
    """`256 · ln(x)` of a whole number `1 <= x < 2^58`, to within 2."""
    start = np.int64(0)
    if x >= 1 << 40:
        x >>= 28
        start = np.int64(28)
    shift = (np.float64(x).view(np.int64) >> 52) - _EXPONENT  # a float64 below 2^53 is exact, and so is its exponent
    if shift >= 0:
        x >>= shift
    else:
        x <<= -shift
    shift += start
    if shift >= 0:
        return np.int64(_LOGS[x - 2048]) + np.int64(_LOGS[2048 + shift])
    return np.int64(_LOGS[x - 2048]) - np.int64(_LOGS[2048 - shift])
