"""The loops of `rans`, compiled: four states in registers."""

from __future__ import annotations

import numpy as np

from bitbook.coding.compiled import compiled


def encode(indices: np.ndarray, frequencies: np.ndarray, precision: int) -> np.ndarray:
    """Words (uint16) of symbols given as positions in the table: the four states first, then what was shifted out."""
    starts = np.concatenate([[0], np.cumsum(frequencies)[:-1]])
    room = np.empty(2 * len(indices) + 16, np.uint16)
    return room[_encode(indices, frequencies, starts, precision, room) :]


@compiled
def _encode(indices, frequencies, starts, precision, room):
    states = np.full(4, 1 << 16, np.int64)
    at = len(room)
    for i in range(len(indices) - 1, -1, -1):
        f = frequencies[indices[i]]
        x = states[i & 3]
        if x >= f << (32 - precision):
            at -= 1
            room[at] = x & 65535
            x >>= 16
        states[i & 3] = (x // f << precision) + x % f + starts[indices[i]]
    for lane in range(3, -1, -1):
        at -= 2
        room[at] = states[lane] & 65535
        room[at + 1] = states[lane] >> 16
    return at


def decode(words: np.ndarray, symbols: np.ndarray, frequencies: np.ndarray, precision: int, codes: np.ndarray) -> bool:
    """Fill `codes`; whether all words were read and every state came back to where encoding began."""
    slots = np.repeat(np.arange(len(symbols), dtype=np.int64), frequencies)
    starts = np.concatenate([[0], np.cumsum(frequencies)[:-1]])
    offsets = np.arange(1 << precision, dtype=np.int64) - starts[slots]
    steps = frequencies[slots].astype(np.uint32)
    return bool(_decode(words, symbols[slots], steps, offsets.astype(np.uint32), precision, codes))


@compiled
def _decode(words, symbols, steps, offsets, precision, codes):
    if len(words) < 8:
        return False
    mask = (1 << precision) - 1
    a = np.int64(words[0]) | np.int64(words[1]) << 16
    b = np.int64(words[2]) | np.int64(words[3]) << 16
    c = np.int64(words[4]) | np.int64(words[5]) << 16
    d = np.int64(words[6]) | np.int64(words[7]) << 16
    if min(a, b, c, d) < 1 << 16:
        return False
    at = 8
    count = len(codes)
    whole = count - count % 4
    for i in range(0, whole, 4):
        if at + 4 > len(words):
            whole = i
            break
        slot = a & mask
        codes[i] = symbols[slot]
        a = np.int64(steps[slot]) * (a >> precision) + np.int64(offsets[slot])
        if a < 1 << 16:
            a = a << 16 | np.int64(words[at])
            at += 1
        slot = b & mask
        codes[i + 1] = symbols[slot]
        b = np.int64(steps[slot]) * (b >> precision) + np.int64(offsets[slot])
        if b < 1 << 16:
            b = b << 16 | np.int64(words[at])
            at += 1
        slot = c & mask
        codes[i + 2] = symbols[slot]
        c = np.int64(steps[slot]) * (c >> precision) + np.int64(offsets[slot])
        if c < 1 << 16:
            c = c << 16 | np.int64(words[at])
            at += 1
        slot = d & mask
        codes[i + 3] = symbols[slot]
        d = np.int64(steps[slot]) * (d >> precision) + np.int64(offsets[slot])
        if d < 1 << 16:
            d = d << 16 | np.int64(words[at])
            at += 1
    for i in range(whole, count):  # whole ends early where fewer than four words are left
        slot = a & mask
        codes[i] = symbols[slot]
        x = np.int64(steps[slot]) * (a >> precision) + np.int64(offsets[slot])
        if x < 1 << 16:
            if at == len(words):
                return False
            x = x << 16 | np.int64(words[at])
            at += 1
        a, b, c, d = b, c, d, x
    return at == len(words) and a == b == c == d == 1 << 16
