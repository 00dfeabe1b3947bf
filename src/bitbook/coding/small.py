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

from bitbook.coding.compiled import compiled, index, inlined
from bitbook.coding.logistic import STRETCH, log, quotient, squash
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
_FIVE, _THREE = (1, 4, 6, 4, 1), (0, 1, 2, 1, 0)
_NEAREST, _WIDEST = 35, 24  # the most that `_surround` counts


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
def _room(stride):
    """Columns beyond either end of the grid that surroundings and blurs may touch."""
    return 3 * stride + 4


@compiled
def _blur_weights(stride, weights):
    """What counts of one would be at scales 9, 5, 3 (blurred, but for the sides of an image) and 1: (4, cols)."""
    cols = weights.shape[1]
    weights[3] = 1
    for j in range(cols):
        for y in range(-2, 3):
            if stride == 1 and y == 0:
                weights[1, j] = 16
                weights[2, j] = 4
            if stride > 1 and 0 <= j + y * stride < cols:
                weights[1, j] += 16 * _FIVE[y + 2]
                weights[2, j] += 4 * _THREE[y + 2]
    for j in range(cols):
        weights[0, j] = 2 * weights[1, j]
        for q in (j - 3, j + 3, j - 3 * stride, j + 3 * stride):
            if 0 <= q < cols:
                weights[0, j] += weights[1, q]


@compiled
def _blur(blurred, cols, j, count, stride):
    """Add `count` at column j to binomial blurs over 5 and 3 columns and image rows, unnormalised.

    `blurred` has a row for each, and on both sides room for what is beyond the grid, which stays zero.
    """
    room = _room(stride)
    for x in range(-2, 3):
        if not 0 <= j + x < cols:
            continue
        if stride == 1:
            blurred[0, room + j + x] += _FIVE[x + 2] * count
            blurred[1, room + j + x] += _THREE[x + 2] * count
            continue
        for y in range(-2, 3):
            q = j + x + y * stride
            if 0 <= q < cols:
                blurred[0, room + q] += _FIVE[x + 2] * _FIVE[y + 2] * count
                blurred[1, room + q] += _THREE[x + 2] * _THREE[y + 2] * count


@compiled
def _refine(found, weights, mean, prior, means, logs, densities):
    """From one scale to the next: `means` and their `logs` become those of this scale, `densities` the steps.

    Each scale is a posterior mean whose prior is the next coarser one.
    """
    for j in range(len(means)):
        means[j] = quotient((found[j] << 16) + prior * means[j], mean * weights[j] + prior)
    for j in range(len(means)):
        finer = log(means[j] + 1)
        densities[j] = finer - logs[j]
        logs[j] = finer


@compiled
def _densities(found, total, stride, blurred, weights, means, logs, densities):
    """Log of each column's share of the non-zeros so far, by scale from coarse to fine: (4, cols)."""
    cols = len(found)
    mean = total // cols
    means[:] = 1 << 16
    logs[:] = _UNITY
    if stride:
        room = _room(stride)
        fine, coarse = blurred[0], blurred[2]
        for j in range(room, room + cols):
            beside, above = fine[j - 3] + fine[j + 3], fine[j - 3 * stride] + fine[j + 3 * stride]
            coarse[j] = 2 * fine[j] + beside + above
        _refine(blurred[2, room:], weights[0], mean, _PRIOR_9 << 3, means, logs, densities[0])
        _refine(blurred[0, room:], weights[1], mean, _PRIOR_5 << 3, means, logs, densities[1])
        _refine(blurred[1, room:], weights[2], mean, _PRIOR_3 << 2, means, logs, densities[2])
    _refine(found, weights[3], mean, _PRIOR_1, means, logs, densities[3])


@compiled
def _neighbours(stride, cols):
    """How far before a column are those left, up, up left, up right, two left and two up: (6,); `cols` is nowhere."""
    if stride > 1:
        return np.array((1, stride, stride + 1, stride - 1, 2, 2 * stride))
    return np.array((1, 3, 4, cols, 2, cols))


@compiled
def _nearness(x, y):
    """Weight of what is x columns beside and y image rows above, in the surroundings."""
    return max((5 if y else 4) - y - abs(x), 0)


@compiled
def _surround(near, wide, j, stride):
    """Count a non-zero at j in the surroundings of the columns after it: within 3 columns and 3 image rows.

    `near` is weighted by nearness, `wide` is not: (cols + room,) both.
    """
    for y in range(4 if stride > 1 else 1):
        for x in range(-3 if y else 1, 4):
            q = j + y * stride + x
            if q > j:  # an image row may be shorter than the surroundings are wide
                near[q] += _nearness(x, y)
                wide[q] += 1


@inlined
def _expect(sums, ramps, at, stride):
    """What is expected in the surroundings of the column `at`: weighted by nearness, and not.

    `sums` are of all that is expected before a column, `ramps` of `sums` up to a column; both begin with room.  A
    difference of sums is a sum over a window, a second difference of ramps one weighted by a triangle.
    """
    near = 4 * sums[index(at)] - ramps[index(at)] + ramps[index(at - 4)]
    wide = sums[index(at)] - sums[index(at - 3)]
    if stride > 1:
        if stride < 4:  # windows reach beyond what is known, which is nothing yet
            for x in range(1, 5 - stride):
                sums[index(at + x)] = sums[index(at)]
                ramps[index(at + x)] = ramps[index(at)] + x * sums[index(at)]
        for y in range(1, 4):
            q = at - y * stride
            near += ramps[index(q + 5 - y)] - 2 * ramps[index(q)] + ramps[index(q - 5 + y)]
            wide += sums[index(q + 4)] - sums[index(q - 3)]
    return near, wide


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
    room = _room(stride)
    blurred = np.zeros((3, room + cols + room), np.int64)
    blur_weights = np.zeros((4, cols), np.int64)
    means = np.zeros(cols, np.int64)
    logs = np.zeros(cols, np.int64)
    _blur_weights(stride, blur_weights)
    densities = np.zeros((4, cols), np.int64)
    neighbours = _neighbours(stride, cols)
    near_found = np.zeros(cols + room, np.int64)  # per column: what the columns before it have told it
    wide_found = np.zeros(cols + room, np.int64)
    pattern = np.zeros(cols, np.int64)  # bits of `neighbours` that are not zero
    nearest = np.zeros(cols, np.int64)
    further = np.zeros(cols, np.int64)
    above_pattern = np.zeros(cols, np.int64)
    sums = np.zeros(room + cols + room, np.int64)
    ramps = np.zeros(room + cols + room, np.int64)
    near_logs = np.array([log((n << _Q) + _PRIOR_NEAR) for n in range(_NEAREST + 1)])
    wide_logs = np.array([log((n << _Q) + _PRIOR_WIDE) for n in range(_WIDEST + 1)])
    link_found = np.full((2, LINKS), _PRIOR_LINK, np.int64)
    link_logs = np.full((2, LINKS), log(_PRIOR_LINK), np.int64)  # of link_found, as they are seldom another
    link_expected = np.full((2, LINKS), _PRIOR_LINK, np.int64)
    pattern_found = np.full((3, 64), _PRIOR_PATTERN, np.int64)
    pattern_logs = np.full((3, 64), log(_PRIOR_PATTERN), np.int64)
    pattern_expected = np.full((3, 64), _PRIOR_PATTERN, np.int64)
    pattern_found[1] = pattern_expected[1] = _PRIOR_ABOVE
    pattern_logs[1] = log(_PRIOR_ABOVE)

    nonzeros = np.full(2, _FIRST, np.int64)  # of even and of odd levels
    symbols = np.full(2, _FIRST << _FIRST_DENSITY, np.int64)
    shares = (nonzeros << 16) // symbols
    place = parity = np.int64(0)  # in the machine
    total = np.int64(0)  # non-zeros of all rows before
    row_found = row_expected = np.int64(0)
    for i in range(rows):
        if total:
            _densities(found, total, stride, blurred, blur_weights, means, logs, densities)
        before = log(row_found + _PRIOR_BEFORE) - log(row_expected + _PRIOR_BEFORE)
        row_found = row_expected = row_balance = row_excess = np.int64(0)
        row_log = log(_PRIOR_ROW)
        near_found[:] = wide_found[:] = pattern[:] = nearest[:] = further[:] = 0
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
            odds = weights[0] * STRETCH[shares[parity]]
            odds += weights[1] * f[1] + weights[2] * f[2] + weights[3] * f[3] + weights[4] * f[4]
            by_column = squash(odds >> 16) >> 4
            f[5] = link_logs[0, kr] - log(link_expected[0, kr]) if kr >= 0 else 0
            f[6] = link_logs[1, kc] - log(link_expected[1, kc]) if kc >= 0 else 0
            odds += weights[5] * f[5] + weights[6] * f[6]
            by_link = squash(odds >> 16) >> 4
            f[7] = before
            f[8] = row_log - log(row_expected + _PRIOR_ROW)
            odds += weights[7] * f[7] + weights[8] * f[8]
            by_row = squash(odds >> 16) >> 4
            at = j + room
            near, wide = _expect(sums, ramps, at, stride)
            sums[at + 1] = sums[at] + by_row
            ramps[at + 1] = ramps[at] + sums[at + 1]
            f[9] = near_logs[index(near_found[j])] - log(near + _PRIOR_NEAR)
            f[10] = wide_logs[index(wide_found[j])] - log(wide + _PRIOR_WIDE)
            odds += weights[9] * f[9] + weights[10] * f[10]
            by_surroundings = squash(odds >> 16) >> 4

            a, b = index(pattern[j]), index(above_pattern[j])
            c = index(min(nearest[j], 7) * 8 + min(further[j], 7))
            f[11] = pattern_logs[0, a] - log(pattern_expected[0, a])
            f[12] = pattern_logs[1, b] - log(pattern_expected[1, b])
            f[13] = pattern_logs[2, c] - log(pattern_expected[2, c])
            odds += weights[11] * f[11] + weights[12] * f[12] + weights[13] * f[13]

            value = np.int64(codes[i, j])
            one = squash(odds >> 16)
            nonzero = code_bit(coder, buffer, 1 if value else 0, one)
            error = ((nonzero << 16) - one) * _ZERO_RATE
            for k in range(1, len(f)):
                weights[k] += (f[k] * error + (1 << 17)) >> 18
            symbols[parity] += 1 << _Q
            nonzeros[parity] += nonzero << _Q
            if nonzero or shares[parity] * symbols[parity] > nonzeros[parity] << 16:  # else it is as it was
                shares[parity] = (nonzeros[parity] << 16) // symbols[parity]
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
                        context = _SIGN_CONTEXTS + 1 + _sign(_at(codes, i, j - 1))
                        negative = code_counted(coder, buffer, 1 if odd[i, j] < 0 else 0, signs, context, _SIGN_LIMIT)
                        sign = np.int64(1 - 2 * negative)
                    odd[i, j] = sign
                    place = machine[place, (sign - parity) >> 1 & 1]
                continue
            row_found += 1 << _Q
            row_log = log(row_found + _PRIOR_ROW)
            if kr >= 0:
                link_found[0, kr] += 1 << _Q
                link_logs[0, kr] = log(link_found[0, kr])
            if kc >= 0:
                link_found[1, kc] += 1 << _Q
                link_logs[1, kc] = log(link_found[1, kc])
            for n, context in enumerate((a, b, c)):
                pattern_found[n, context] += 1 << _Q
                pattern_logs[n, context] = log(pattern_found[n, context])

            above, above2 = _at(codes, i - 1, j), _at(codes, i - 2, j)
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
                left, up = _at(codes, i, j - neighbours[0]), _at(codes, i, j - neighbours[1])
                up_left, up_right = _at(codes, i, j - neighbours[2]), _at(codes, i, j - neighbours[3])
                left2, up2 = _at(codes, i, j - neighbours[4]), _at(codes, i, j - neighbours[5])
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
                size_at[2] = first + 3 + min(nearest[j], 5)
                size_at[3] = first + 10 + size_row
                size_at[4] = first + 17 + size_col
                size_at[5] = first + 24 + likely
                size_at[6] = first + 36 + 4 * min(abs(above), 3) + min(further[j], 3)
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
            size = abs(np.int64(codes[i, j]))
            _surround(near_found, wide_found, j, stride)
            for n in range(len(neighbours)):
                q = j + neighbours[n]
                if q < cols:
                    pattern[q] += 1 << n
                    if n < 2:
                        nearest[q] += size
                    else:
                        further[q] += size
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
            above_pattern[j] = (above_pattern[j] & 1) << 1
        for j in range(cols):
            value = np.int64(codes[i, j])
            if value:
                above_pattern[j] += 1
                if j + 1 < cols:
                    above_pattern[j + 1] += 4
                if j:
                    above_pattern[j - 1] += 8
                count = min(1 << _Q, _MOST_FOUND - found[j])
                found[j] += count
                if stride:
                    _blur(blurred, cols, j, count, stride)
                balance[j] += _sign(value)
                excess[j] += min(abs(value) - 1, 255)
                total += 1 << _Q
    return outside
