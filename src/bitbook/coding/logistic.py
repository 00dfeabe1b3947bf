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


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    exponentials = _exponentials(40 * UNIT)
    squash = np.empty(2 * LIMIT + 1, np.int32)
    for x in range(LIMIT + 1):
        one = (exponentials[x] << 16) // (_SCALE + exponentials[x])
        squash[LIMIT + x] = min(max(one, 1), 65535)
        squash[LIMIT - x] = 65536 - squash[LIMIT + x]
    stretch = np.searchsorted(squash, np.arange(65536), side="left").astype(np.int32) - LIMIT
    stretch = np.clip(stretch, -LIMIT, LIMIT)
    mantissas = np.empty(2048, np.int32)
    x = 7 * UNIT
    for mantissa in range(2048, 4096):
        while exponentials[x + 1] <= mantissa * _SCALE:
            x += 1
        mantissas[mantissa - 2048] = x
    powers = []  # of two, from 1 to 2^41
    x = 0
    for shift in range(42):
        while exponentials[x + 1] <= _SCALE << shift:
            x += 1
        powers.append(x)
    exponents = np.array([-x for x in powers[11:0:-1]] + powers, np.int32)
    return squash, stretch.astype(np.int32), mantissas, exponents


SQUASH, STRETCH, _MANTISSAS, _EXPONENTS = _tables()


@compiled
def squash(x):
    """The probability (in 1/65536, never 0 or 1) whose log odds are x / 256."""
    return np.int64(SQUASH[min(max(x, -LIMIT), LIMIT) + LIMIT])


@compiled
def log(x):
    """`256 · ln(x)` of a whole number `1 <= x < 2^53`, to within 2: that of its first twelve bits and of the rest."""
    bits = np.float64(x).view(np.int64)  # exact: a mantissa of 52 bits, an exponent
    mantissa, exponent = bits >> 41 & 2047, (bits >> 52) - 1023 & 63
    return np.int64(_MANTISSAS[mantissa]) + np.int64(_EXPONENTS[exponent])


@compiled
def quotient(a, b):
    """`a // b` of whole numbers a >= 0 and b > 0, where it is below 2^50; several of them at once, unlike `//`.

    The quotient of float64 is off by less than a half, so rounded down by one at most.
    """
    q = np.int64(np.divide(np.float64(a), np.float64(b)))
    rest = a - q * b
    return q - (rest < 0) + (rest >= b)
