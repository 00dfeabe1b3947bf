"""The loops of `fixed`, compiled: what takes a gigabyte a second instead of a tenth."""

from __future__ import annotations

import numpy as np

from bitbook.coding.compiled import compiled

_LANES = 64
_HALF = 31  # bits of a number whose quotient a product of 64 bits gives exactly


def unpack(packed: np.ndarray, w: int, alphabet: int, g: int, codes: np.ndarray) -> bool:
    """Fill `codes` from words of w bits, 64 in each row of `packed` (uint64); g digits in base `alphabet` are a word.

    Returns whether words have no more digits than there are codes; without digits (g = 1) codes may be any of w bits.
    """
    if g == 1:
        _unpack_fields(packed, w, codes)
        return True
    return bool(_unpack_digits(packed, w, alphabet, g, *_reciprocal(alphabet), codes))


def _reciprocal(alphabet: int) -> tuple[int, int, int, int]:
    """Digits that fit into 31 bits, their number of values, and m, s with `n // alphabet = n · m >> s` (n < 2^31).

    (Granlund & Montgomery 1994, theorem 4.2.)
    """
    digits = 1
    while alphabet ** (digits + 1) < 1 << _HALF:
        digits += 1
    shift = _HALF + (alphabet - 1).bit_length()
    return digits, alphabet**digits, -(-(1 << shift) // alphabet), shift


@compiled
def _field(row, w, lane):
    """Word `lane` of a row, with what lies above it."""
    at, shift = lane * w // 64, lane * w % 64
    value = row[at] >> np.uint64(shift)
    if shift + w > 64:
        value |= row[at + 1] << np.uint64(64 - shift)
    return value


@compiled
def _unpack_fields(packed, w, codes):
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - w)
    words = packed.reshape(-1)
    current, left, at = words[0], 64, 1
    for i in range(len(codes)):
        if left >= w:
            codes[i] = current & mask
            current = current >> np.uint64(w) if w < 64 else np.uint64(0)
            left -= w
        else:
            following = words[at]
            at += 1
            codes[i] = (current | following << np.uint64(left)) & mask
            current = following >> np.uint64(w - left)
            left += 64 - w


@compiled
def _unpack_digits(packed, w, alphabet, g, digits, values, factor, shift, codes):
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - w)
    words = (len(codes) + g - 1) // g
    at = 0
    for i in range(words):
        word = _field(packed[i // _LANES], w, i % _LANES) & mask
        left = min(g, len(codes) - at)
        while left > 0:
            rest = word // np.uint64(values)
            part = np.int64(word - rest * np.uint64(values))
            word = rest
            for _ in range(min(digits, left)):
                quotient = part * factor >> shift
                codes[at] = part - quotient * alphabet
                part = quotient
                at += 1
            left -= digits
            if part and left <= 0:
                return False
        if word:
            return False
    return True
