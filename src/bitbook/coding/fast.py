"""The profile *fast*: zero flag, sign and magnitude of every symbol, each bit by one context of its neighbours.

The contexts are those of DeepCABAC (Wiedemann et al. 2020, §III) and the activity of row and column; a bit's
probability is the mean of two estimates that adapt at two rates.
"""

from __future__ import annotations

import numpy as np

from bitbook.coding.compiled import compiled
from bitbook.coding.mixing import Counters, code_golomb
from bitbook.coding.range_coder import DECODING, code_bit

UNARY = 14
_SLOW, _FAST = 8, 5
_ACTIVITY = 8  # classes of row and column activity
_ZERO = 4 * _ACTIVITY * _ACTIVITY
_CONTEXTS = _ZERO + 9 + 4 * UNARY


def fresh() -> tuple[np.ndarray, Counters]:
    """What is learnt, before anything is: probabilities at two rates and a count, and the counters of escapes."""
    states = np.full((2 * _CONTEXTS + 1, 3), 1 << 15, np.int64)
    states[:, 2] = 0
    for parity in (0, 1):
        states[parity * _CONTEXTS : parity * _CONTEXTS + _ZERO, :2] = 1 << 13
    return states, Counters.fresh(32)


@compiled
def _code(coder, buffer, bit, states, context):
    slow, fast, seen = states[context]
    bit = code_bit(coder, buffer, bit, min(max((slow + fast) >> 1, 16), 65536 - 16))
    target = bit << 16
    if seen < 1 << _SLOW:  # both start as one count
        states[context, 2] = seen + 1
        slow += ((target - slow) * 2) // (2 * seen + 3)
    else:
        slow += (target - slow) >> _SLOW
    fast = slow if seen < 1 << _FAST else fast + ((target - fast) >> _FAST)
    states[context, 0] = slow
    states[context, 1] = fast
    return bit


@compiled
def _class(activity):
    """0…7 by doubling steps of an activity in 1/4096."""
    if activity < 256:
        return 0 if activity < 64 else (1 if activity < 128 else 2)
    if activity < 1024:
        return 3 if activity < 512 else 4
    return 5 if activity < 1600 else (6 if activity < 2600 else 7)


@compiled
def _sign_class(value):
    return 0 if value == 0 else (1 if value > 0 else 2)


@compiled
def code_grid(coder, buffer, codes, low, high, machine, odd, states, escapes):
    """Code or fill `codes`, (rows, cols) int32 from `low` <= 0 to `high` >= 0; returns how many were beyond.

    With a `machine`, codes are halves of levels, towards zero, and `odd` are the signs of the odd levels, zero
    elsewhere; both are filled.  Where a level is odd, contexts are others, and a zero has a sign.
    """
    rows, cols = codes.shape
    outside = 0
    place = parity = np.int64(0)
    mine = np.int64(0)  # where the contexts of this parity begin
    columns = np.full(cols, 512, np.int64)
    for i in range(rows):
        row = np.int64(512)
        left = np.int64(0)
        for j in range(cols):
            above = np.int64(codes[i - 1, j]) if i > 0 else np.int64(0)
            column = columns[j]
            context = (_class(row) * _ACTIVITY + _class(column)) * 4 + (2 if left else 0) + (1 if above else 0)
            value = np.int64(codes[i, j])
            if len(machine):
                parity = place & 1
                mine = parity * _CONTEXTS
            if not _code(coder, buffer, 1 if value else 0, states, mine + context):
                row -= row >> 5
                columns[j] = column - (column >> 4)
                codes[i, j] = 0
                left = np.int64(0)
                if len(machine):
                    sign = np.int64(0)
                    if parity:
                        sign = 1 - 2 * _code(coder, buffer, 1 if odd[i, j] < 0 else 0, states, 2 * _CONTEXTS)
                    odd[i, j] = sign
                    place = machine[place, (sign - parity) >> 1 & 1]
                continue
            row += (4096 - row) >> 5
            columns[j] = column + ((4096 - column) >> 4)
            negative = 1 if value < 0 else 0
            if low < 0 and high > 0:
                signs = (0 if left == 0 else (1 if left > 0 else 2)) * 3 + (
                    0 if above == 0 else (1 if above > 0 else 2)
                )
                negative = _code(coder, buffer, negative, states, mine + _ZERO + signs)
            elif low < 0:
                negative = 1
            else:
                negative = 0
            most = -low if negative else high
            size = abs(value)
            near = min((abs(left) + abs(above) + 1) >> 1, 3)
            k = np.int64(1)
            while k < UNARY and k < most:
                if not _code(coder, buffer, 1 if size > k else 0, states, mine + _ZERO + 9 + 4 * (k - 1) + near):
                    break
                k += 1
            if k == UNARY and k < most:
                k += code_golomb(coder, buffer, size - UNARY, escapes, 0)
                if k > most:
                    outside += 1
                    k = np.int64(most)
            value = -k if negative else k
            if coder[DECODING]:
                codes[i, j] = value
            left = value
            if len(machine):
                sign = np.int64(-parity if negative else parity)
                odd[i, j] = sign
                place = machine[place, (2 * value + sign - parity) >> 1 & 1]
    return outside
