"""The profile *small*: zero flag, sign and magnitude of every symbol, each bit by several models, mixed.

The zero flag is a logistic regression, learnt on the way, whose inputs are logarithms of ratios found / expected:

    density · column (blurred at 4 scales) · linked row, column · row before, row so far · surroundings · patterns

What is expected comes from the factors before, so a factor speaks only of what those leave open, starts silent and
needs no training.  A few hundred non-zeros are enough to learn from.  Signs and magnitudes are mixed counters.

Where the columns of a grid are an image, `stride` is the length of its rows: the pixel above column j is column
j - stride.  A stride of 1 is neighbours left and right only, 0 is columns in no order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitbook.coding.compiled import compiled
from bitbook.coding.logistic import STRETCH, log, squash
from bitbook.coding.mixing import Counters, code_counted, code_golomb, code_mixed
from bitbook.coding.range_coder import DECODING, code_bit

UNARY = 14
LINKS = 8
"""Classes of rows or columns known from another grid."""

# Counts and expectations are in 1/4096. Prior strengths, rates and first weights were found on sparse trained layers.
_Q = 12
_PRIOR_9, _PRIOR_5, _PRIOR_3, _PRIOR_1 = 19 << 8, 12 << 8, 19 << 8, 23 << 8
_PRIOR_LINK, _PRIOR_BEFORE, _PRIOR_ROW = 32 << 8, 53 << 8, 1 << 8
_PRIOR_NEAR, _PRIOR_WIDE, _PRIOR_PATTERN, _PRIOR_ABOVE = 27 << 8, 32 << 8, 12 << 8, 13 << 8
_FIRST, _FIRST_DENSITY = 3 << _Q, 4  # three of 3 · 2^4 symbols were not zero before the first
_ZERO_RATE, _SIGN_RATE, _SIZE_RATE = 14, 22, 14
_SIGN_LIMIT, _SIZE_LIMIT = 45, 73
_ZERO_WEIGHTS = (175, 256, 58, 115, 86, 128, 331, 14, 76, 100, 64, 89, 28, 105)
_SIGN_WEIGHTS = (5, 71, 29, 35, 49, 36, 80, 60, 60, 17, 50)
_SIZE_WEIGHTS = (-87, 128, 105, 41, 50, 33, 29)
_SIGN_AT = (0, 1, 10, 17, 24, 31, 40, 53, 80, 93, 104)  # where each model's contexts start
_SIGN_CONTEXTS = 117
_SIZE_CONTEXTS = 64 * UNARY + 32
_ODD_SIGNS, _ODD_SIZES = 3, UNARY  # contexts of odd levels, after all others
_LIST = 32  # most recent non-zeros of a column, compared with
_MOST_FOUND = 1 << 34
_UNITY = 2839  # log(1 << 16)


class Learnt(NamedTuple):
    """What goes from grid to grid: counters and mixing weights of signs and magnitudes."""

    signs: Counters
    sign_weights: np.ndarray
    sizes: Counters
    size_weights: np.ndarray

    @classmethod
    def fresh(cls) -> Learnt:
        return cls(
            Counters.fresh(_SIGN_CONTEXTS + _ODD_SIGNS),
            np.array(_SIGN_WEIGHTS, np.int64) << 8,
            Counters.fresh(_SIZE_CONTEXTS + _ODD_SIZES),
            np.tile(np.array(_SIZE_WEIGHTS, np.int64) << 8, (4, 1)),
        )


@compiled
def _ratio(found, expected, prior):
    """Log of found / expected, each with the same prior count added."""
    return log(found + prior) - log(expected + prior)


@compiled
def _clip(x, most):
    return min(max(x, -most), most)


@compiled
def _sign(x):
    return 0 if x == 0 else (1 if x > 0 else -1)


@compiled
def _class(x):
    """0…6 by doublings from 1/4."""
    k = 0
    while x > 1024 and k < 6:
        x >>= 1
        k += 1
    return k


@compiled
def _at(codes, i, j):
    """The code, 0 outside the grid."""
    return np.int64(codes[i, j]) if i >= 0 and 0 <= j < codes.shape[1] else np.int64(0)


@compiled
def _blur(found, stride, blurred, weights):
    """Binomial blurs of (cols,) over 5 and 3 columns each way, unnormalised, and their weights: both (2, cols)."""
    cols = len(found)
    line = np.zeros((2, cols), np.int64)
    for j in range(cols):
        for k in range(-2, 3):
            if 0 <= j + k < cols:
                line[0, j] += (6 if k == 0 else (4 if abs(k) == 1 else 1)) * found[j + k]
                if abs(k) < 2:
                    line[1, j] += (2 - abs(k)) * found[j + k]
    if stride == 1:
        blurred[:] = line
        weights[0, :] = 16
        weights[1, :] = 4
        return
    blurred[:] = 0
    weights[:] = 0
    for j in range(cols):
        for k in range(-2, 3):
            q = j + k * stride
            if 0 <= q < cols:
                w = 6 if k == 0 else (4 if abs(k) == 1 else 1)
                blurred[0, j] += w * line[0, q]
                weights[0, j] += 16 * w
                if abs(k) < 2:
                    blurred[1, j] += (2 - abs(k)) * line[1, q]
                    weights[1, j] += 4 * (2 - abs(k))


@compiled
def _densities(found, total, stride, blurred, weights, densities):
    """Log of each column's share of the non-zeros so far, by scale from coarse to fine: (4, cols).

    Each scale is a posterior mean whose prior is the next coarser one; what is written is the step between the two.
    """
    cols = len(found)
    mean = total // cols
    if stride:
        _blur(found, stride, blurred, weights)
    for j in range(cols):
        r3 = np.int64(1 << 16)
        last = np.int64(_UNITY)
        if stride:
            t9 = 2 * blurred[0, j]
            w9 = 2 * weights[0, j]
            for q in (j - 3, j + 3, j - 3 * stride, j + 3 * stride):
                if 0 <= q < cols:
                    t9 += blurred[0, q]
                    w9 += weights[0, q]
            r9 = ((t9 + (_PRIOR_9 << 3)) << 16) // (mean * w9 + (_PRIOR_9 << 3))
            r5 = ((blurred[0, j] << 16) + (_PRIOR_5 << 3) * r9) // (mean * weights[0, j] + (_PRIOR_5 << 3))
            r3 = ((blurred[1, j] << 16) + (_PRIOR_3 << 2) * r5) // (mean * weights[1, j] + (_PRIOR_3 << 2))
            l9, l5, last = log(r9 + 1), log(r5 + 1), log(r3 + 1)
            densities[0, j] = l9 - _UNITY
            densities[1, j] = l5 - l9
            densities[2, j] = last - l5
        r1 = ((found[j] << 16) + _PRIOR_1 * r3) // (mean + _PRIOR_1)
        densities[3, j] = log(r1 + 1) - last


@compiled
def _surroundings(codes, expected, i, j, stride):
    """Non-zeros before (i, j) within 3 columns and 3 image rows: found and expected, weighted by nearness and not."""
    near_found = near = wide_found = wide = np.int64(0)
    for y in range(4 if stride > 1 else 1):
        for x in range(-3, 4 if y else 0):
            q = j - y * stride + x
            if q < 0 or q >= j:  # an image row may be shorter than the surroundings are wide
                continue
            w = max((5 if y else 4) - y - abs(x), 0)
            e = expected[q]
            wide += e
            near += w * e
            if codes[i, q]:
                wide_found += 1
                near_found += w
    return near_found << _Q, near, wide_found << _Q, wide


@compiled
def _sign_around(codes, i, j, stride):
    """The signs of `_surroundings`, weighted by nearness and added, halved towards zero."""
    total = np.int64(0)
    for y in range(4 if stride > 1 else 1):
        for x in range(-3, 4 if y else 0):
            q = j - y * stride + x
            w = (5 if y else 4) - y - abs(x)
            if w > 0 and q < j:
                total += w * _sign(_at(codes, i, q))
    return total // 2 if total > 0 else -(-total // 2)


@compiled
def code_grid(coder, buffer, codes, stride, low, high, machine, odd, row_links, col_links, learnt):
    """Code or fill `codes`, (rows, cols) int32 from `low` <= 0 to `high` >= 0.

    Args:
        coder: state of the range coder.
        buffer: its bytes.
        codes: written when decoding.
        stride: the length of an image row among the columns, 1 or 0 (see above).
        low: least code.
        high: largest code.
        machine: (states, 2) the next states of a trellis, or no rows.  With one, codes are halves of levels, towards
            zero; where a level is odd, the first factor is another, and a zero has a sign.
        odd: (rows, cols) int32, with a machine: the signs of the odd levels, zero elsewhere; written when decoding.
        row_links: (rows,) class of each row in [0, LINKS), or -1 in all.
        col_links: (cols,) the same for columns.
        learnt: see `Learnt`; goes on.

    Returns:
        How many symbols lay outside [low, high], which only bad bytes can cause; they become the limit.
    """
    rows, cols = codes.shape
    signs, sign_weights, sizes, size_weights = learnt
    outside = 0
    weights = np.zeros(len(_ZERO_WEIGHTS), np.int64)
    for k in range(len(weights)):
        weights[k] = _ZERO_WEIGHTS[k] << 8
    f = np.zeros(len(_ZERO_WEIGHTS), np.int64)
    sign_at = np.zeros(len(_SIGN_WEIGHTS), np.int64)
    sign_inputs = np.zeros(len(_SIGN_WEIGHTS), np.int64)
    size_at = np.zeros(len(_SIZE_WEIGHTS), np.int64)
    size_inputs = np.zeros(len(_SIZE_WEIGHTS), np.int64)

    found = np.zeros(cols, np.int64)  # per column: non-zeros, signs, magnitudes beyond 1, where non-zeros are
    balance = np.zeros(cols, np.int64)
    excess = np.zeros(cols, np.int64)
    holders = np.zeros((cols, _LIST), np.int64)
    held = np.zeros(cols, np.int64)
    touched = np.zeros(rows, np.int64)  # rows before that share something with this one
    touches = 0
    shared = np.zeros(rows, np.int64)  # per row before: non-zeros shared with this one, and equal signs less unequal
    agreement = np.zeros(rows, np.int64)
    blurred = np.zeros((2, cols), np.int64)
    blur_weights = np.zeros((2, cols), np.int64)
    densities = np.zeros((4, cols), np.int64)
    expected = np.zeros(cols, np.int64)
    link_found = np.zeros((2, LINKS), np.int64)
    link_expected = np.zeros((2, LINKS), np.int64)
    pattern_found = np.zeros((3, 64), np.int64)
    pattern_expected = np.zeros((3, 64), np.int64)

    nonzeros = np.full(2, _FIRST, np.int64)  # of even and of odd levels
    symbols = np.full(2, _FIRST << _FIRST_DENSITY, np.int64)
    place = parity = np.int64(0)  # in the machine
    total = np.int64(0)  # non-zeros of all rows before
    row_found = row_expected = np.int64(0)
    for i in range(rows):
        if total:
            _densities(found, total, stride, blurred, blur_weights, densities)
        before = _ratio(row_found, row_expected, _PRIOR_BEFORE)
        row_found = row_expected = row_balance = row_excess = np.int64(0)
        for k in range(touches):
            shared[touched[k]] = 0
            agreement[touched[k]] = 0
        touches = 0
        kr = row_links[i]
        for j in range(cols):
            kc = col_links[j]
            f[1] = densities[0, j]
            f[2] = densities[1, j]
            f[3] = densities[2, j]
            f[4] = densities[3, j]
            if len(machine):
                parity = place & 1
            odds = weights[0] * STRETCH[(nonzeros[parity] << 16) // symbols[parity]]
            odds += weights[1] * f[1] + weights[2] * f[2] + weights[3] * f[3] + weights[4] * f[4]
            by_column = squash(odds >> 16) >> 4
            f[5] = _ratio(link_found[0, kr], link_expected[0, kr], _PRIOR_LINK) if kr >= 0 else 0
            f[6] = _ratio(link_found[1, kc], link_expected[1, kc], _PRIOR_LINK) if kc >= 0 else 0
            odds += weights[5] * f[5] + weights[6] * f[6]
            by_link = squash(odds >> 16) >> 4
            f[7] = before
            f[8] = _ratio(row_found, row_expected, _PRIOR_ROW)
            odds += weights[7] * f[7] + weights[8] * f[8]
            expected[j] = squash(odds >> 16) >> 4
            near_found, near, wide_found, wide = _surroundings(codes, expected, i, j, stride)
            f[9] = _ratio(near_found, near, _PRIOR_NEAR)
            f[10] = _ratio(wide_found, wide, _PRIOR_WIDE)
            odds += weights[9] * f[9] + weights[10] * f[10]
            by_surroundings = squash(odds >> 16) >> 4

            left, left2 = _at(codes, i, j - 1), _at(codes, i, j - 2)
            if stride > 1:
                up, up2 = _at(codes, i, j - stride), _at(codes, i, j - 2 * stride)
                up_left, up_right = _at(codes, i, j - stride - 1), _at(codes, i, j - stride + 1)
            else:
                up, up2, up_left, up_right = _at(codes, i, j - 3), np.int64(0), _at(codes, i, j - 4), np.int64(0)
            above, above2 = _at(codes, i - 1, j), _at(codes, i - 2, j)
            a = (1 if left else 0) + (2 if up else 0) + (4 if up_left else 0)
            a += (8 if up_right else 0) + (16 if left2 else 0) + (32 if up2 else 0)
            b = (1 if above else 0) + (2 if above2 else 0)
            b += (4 if _at(codes, i - 1, j - 1) else 0) + (8 if _at(codes, i - 1, j + 1) else 0)
            nearest = abs(left) + abs(up)
            further = abs(up_left) + abs(up_right) + abs(left2) + abs(up2)
            c = min(nearest, 7) * 8 + min(further, 7)
            f[11] = _ratio(pattern_found[0, a], pattern_expected[0, a], _PRIOR_PATTERN)
            f[12] = _ratio(pattern_found[1, b], pattern_expected[1, b], _PRIOR_ABOVE)
            f[13] = _ratio(pattern_found[2, c], pattern_expected[2, c], _PRIOR_PATTERN)
            odds += weights[11] * f[11] + weights[12] * f[12] + weights[13] * f[13]

            value = np.int64(codes[i, j])
            one = squash(odds >> 16)
            nonzero = code_bit(coder, buffer, 1 if value else 0, one)
            error = ((nonzero << 16) - one) * _ZERO_RATE
            for k in range(1, len(f)):
                weights[k] += (f[k] * error + (1 << 17)) >> 18
            symbols[parity] += 1 << _Q
            row_expected += by_link
            if kr >= 0:
                link_expected[0, kr] += by_column
            if kc >= 0:
                link_expected[1, kc] += by_column
            pattern_expected[0, a] += by_surroundings
            pattern_expected[1, b] += by_surroundings
            pattern_expected[2, c] += by_surroundings
            if not nonzero:
                codes[i, j] = 0
                if len(machine):
                    sign = np.int64(0)
                    if parity:
                        context = _SIGN_CONTEXTS + 1 + _sign(left)
                        negative = code_counted(coder, buffer, 1 if odd[i, j] < 0 else 0, signs, context, _SIGN_LIMIT)
                        sign = np.int64(1 - 2 * negative)
                    odd[i, j] = sign
                    place = machine[place, (sign - parity) >> 1 & 1]
                continue
            nonzeros[parity] += 1 << _Q
            row_found += 1 << _Q
            if kr >= 0:
                link_found[0, kr] += 1 << _Q
            if kc >= 0:
                link_found[1, kc] += 1 << _Q
            pattern_found[0, a] += 1 << _Q
            pattern_found[1, b] += 1 << _Q
            pattern_found[2, c] += 1 << _Q

            members = min(held[j], _LIST)
            negative = 1 if value < 0 else 0
            if low < 0 and high > 0:
                around = np.int64(0)
                if stride:
                    around = (balance[j - 1] if j else 0) + (balance[j + 1] if j + 1 < cols else 0)
                if stride > 1:
                    around += balance[j - stride] if j >= stride else 0
                    around += balance[j + stride] if j + stride < cols else 0
                alike = np.int64(0)  # rows that agreed with this one so far, asked about this column
                asked = np.int64(1)
                for k in range(members):
                    alike += agreement[holders[j, k]] * _sign(codes[holders[j, k], j])
                    asked += shared[holders[j, k]]
                nearer = _sign(left) + _sign(up)
                farther = _sign(up_left) + _sign(up_right) + _sign(left2) + _sign(up2)
                sign_at[0] = _SIGN_AT[0]
                sign_at[1] = _SIGN_AT[1] + 3 * _sign(left) + _sign(up) + 4
                sign_at[2] = _SIGN_AT[2] + _clip(row_balance, 3) + 3
                sign_at[3] = _SIGN_AT[3] + _clip(balance[j], 3) + 3
                sign_at[4] = _SIGN_AT[4] + _clip(around, 3) + 3
                sign_at[5] = _SIGN_AT[5] + 3 * _sign(above) + _sign(above2) + 4
                sign_at[6] = _SIGN_AT[6] + _clip(2 * nearer + farther, 6) + 6
                sign_at[7] = _SIGN_AT[7] + 9 * _clip(nearer, 1) + 3 * _clip(farther, 1) + _clip(row_balance, 1) + 13
                sign_at[8] = _SIGN_AT[8] + _clip(alike, 6) + 6
                sign_at[9] = _SIGN_AT[9] + _clip(_sign_around(codes, i, j, stride), 5) + 5
                sign_at[10] = _SIGN_AT[10] + _clip(alike * 12 // asked, 6) + 6
                negative = code_mixed(
                    coder, buffer, negative, signs, sign_at, sign_weights, sign_inputs, _SIGN_RATE, _SIGN_LIMIT
                )
            elif low < 0:
                negative = 1
            else:
                negative = 0

            most = -low if negative else high
            size = abs(value)
            size_row = _class((row_excess << _Q) // ((row_found >> _Q) - 1)) if row_found > 1 << _Q else 0
            size_col = _class((excess[j] << _Q) // (found[j] >> _Q)) if found[j] else 0
            likely = min(max((odds >> 16) + 8 * 192, 0) // 192, 11)
            k = np.int64(1)
            while k < UNARY and k < most:
                first = 64 * (k - 1)
                size_at[0] = _SIZE_CONTEXTS + k - 1 if parity else first
                size_at[1] = first + 1 + negative
                size_at[2] = first + 3 + min(nearest, 5)
                size_at[3] = first + 10 + size_row
                size_at[4] = first + 17 + size_col
                size_at[5] = first + 24 + likely
                size_at[6] = first + 36 + 4 * min(abs(above), 3) + min(further, 3)
                more = 1 if size > k else 0
                mixer = size_weights[min(k - 1, 3)]
                if not code_mixed(coder, buffer, more, sizes, size_at, mixer, size_inputs, _SIZE_RATE, _SIZE_LIMIT):
                    break
                k += 1
            if k == UNARY and k < most:
                k += code_golomb(coder, buffer, size - UNARY, sizes, 64 * UNARY)
                if k > most:
                    outside += 1
                    k = np.int64(most)
            if coder[DECODING]:
                codes[i, j] = -k if negative else k
            sign = np.int64(-1 if negative else 1)
            if len(machine):
                odd[i, j] = sign * parity
                place = machine[place, (2 * sign * k + sign * parity - parity) >> 1 & 1]
            row_balance += sign
            row_excess += min(k - 1, 255)
            for q in range(members):
                other = holders[j, q]
                if not shared[other]:
                    touched[touches] = other
                    touches += 1
                shared[other] += 1
                agreement[other] += sign * _sign(codes[other, j])
            holders[j, held[j] % _LIST] = i
            held[j] += 1
        for j in range(cols):
            value = np.int64(codes[i, j])
            if value:
                found[j] = min(found[j] + (1 << _Q), _MOST_FOUND)
                balance[j] += _sign(value)
                excess[j] += min(abs(value) - 1, 255)
                total += 1 << _Q
    return outside
