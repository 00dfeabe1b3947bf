"""Adaptive bits: counters that learn fast, one alone or several mixed in the logistic domain.

A counter holds the odds of a one in 1/2^22 and moves by 1/(n + 1.6) after its n-th bit, down to a least rate, so that
it starts as the estimator of Krichevsky & Trofimov 1981 and ends as an exponential window.  Mixing adds weighted
log odds and moves the weights against the coding error (Mahoney 2005, PAQ; Mattern 2013 for the reasons).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitbook.coding.compiled import compiled
from bitbook.coding.logistic import STRETCH, squash
from bitbook.coding.range_coder import DECODING, code_bit

LONGEST = 31
"""Most bits of a number in Exp-Golomb, so that decoding ends."""

_HALF = 1 << 21
_LEAST = 32  # of a mixed or counted probability in 1/65536: one bit never costs more than 11
_RATE_ONE, _RATE_START = 10, 16  # 10 / (10 n + 16)


class Counters(NamedTuple):
    """Odds of contexts, and how many bits each has seen."""

    odds: np.ndarray
    seen: np.ndarray

    @classmethod
    def fresh(cls, contexts: int) -> Counters:
        return cls(np.full(contexts, _HALF, np.int64), np.zeros(contexts, np.int64))


@compiled
def learn(counters, context, bit, limit):
    """Move one counter towards the bit."""
    odds, seen = counters
    n = seen[context]
    odds[context] += ((bit << 22) - odds[context]) * _RATE_ONE // (_RATE_ONE * n + _RATE_START)
    if n < limit:
        seen[context] = n + 1


@compiled
def code_counted(coder, buffer, bit, counters, context, limit):
    """Code a bit by one counter; returns it."""
    one = counters[0][context] >> 6
    bit = code_bit(coder, buffer, bit, min(max(one, _LEAST), 65536 - _LEAST))
    learn(counters, context, bit, limit)
    return bit


@compiled
def code_mixed(coder, buffer, bit, counters, contexts, weights, inputs, rate, limit):
    """Code a bit by the counters at `contexts`, mixed by `weights` (1/65536); `inputs` is room for the log odds."""
    odds = counters[0]
    total = np.int64(0)
    for i in range(len(contexts)):
        inputs[i] = STRETCH[odds[contexts[i]] >> 6]
        total += weights[i] * inputs[i]
    one = min(max(squash(total >> 16), _LEAST), 65536 - _LEAST)
    bit = code_bit(coder, buffer, bit, one)
    error = ((bit << 16) - one) * rate
    for i in range(len(contexts)):
        weights[i] += (inputs[i] * error + (1 << 17)) >> 18
        learn(counters, contexts[i], bit, limit)
    return bit


@compiled
def code_golomb(coder, buffer, value, counters, first):
    """Code a whole number from 0 to 2^31 - 2 by Exp-Golomb: the length by counters from `first` on, then plain bits."""
    number = value + 1
    length = np.int64(0)
    if not coder[DECODING]:
        while number >> (length + 1):
            length += 1
    k = np.int64(0)
    while k < LONGEST - 1 and code_counted(coder, buffer, 1 if length > k else 0, counters, first + k, 255):
        k += 1
    result = np.int64(1)
    for i in range(k - 1, -1, -1):
        result = result << 1 | code_bit(coder, buffer, number >> i & 1, 32768)
    return result - 1
