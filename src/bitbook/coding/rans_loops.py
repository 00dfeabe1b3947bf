"""The loops of `rans`, compiled: four states in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bitbook.coding.compiled import compiled

_CHUNK = 1 << 18  # symbols whose positions are looked up together; a multiple of the lanes


def encode(
    codes: np.ndarray, indices: Callable[[np.ndarray], np.ndarray], frequencies: Sequence[np.ndarray], precision: int
) -> np.ndarray:
    """Words (uint16) of codes: the four states first, then what was shifted out; `indices` finds them in the tables."""
    table = np.concatenate(frequencies)
    starts = np.concatenate([_starts(f) for f in frequencies])
    states = np.full(4, 1 << 16, np.int64)
    room = np.empty(len(codes) + 8, np.uint16)  # a symbol shifts out one word at most
    at = len(room)
    for start in range((len(codes) - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
        at = _encode(indices(codes[start : start + _CHUNK]), table, starts, precision, states, room, at)
    for lane in range(3, -1, -1):
        at -= 2
        room[at] = states[lane] & 65535
        room[at + 1] = states[lane] >> 16
    return room[at:]


def _starts(frequencies: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(frequencies)[:-1]])


@compiled
def _encode(indices, frequencies, starts, precision, states, room, at):
    """Code a chunk from its last symbol to its first; changes `states`, fills `room` before `at`, returns where."""
    for i in range(len(indices) - 1, -1, -1):
        f = frequencies[indices[i]]
        x = states[i & 3]
        if x >= f << (32 - precision):
            at -= 1
            room[at] = x & 65535
            x >>= 16
        states[i & 3] = (x // f << precision) + x % f + starts[indices[i]]
    return at


def decode(
    words: np.ndarray,
    tables: Sequence[tuple[np.ndarray, np.ndarray]],
    precision: int,
    machine: np.ndarray | None,
    codes: np.ndarray,
) -> bool:
    """Fill `codes`; whether all words were read and every state came back to where encoding began.

    With a machine there are two tables of symbols and frequencies, of even and of odd codes.
    """
    slots = np.stack([np.repeat(np.arange(len(f), dtype=np.int64), f) for _, f in tables])
    symbols = np.stack([s.astype(codes.dtype)[slot] for (s, _), slot in zip(tables, slots, strict=True)])
    steps = np.stack([f[slot] for (_, f), slot in zip(tables, slots, strict=True)]).astype(np.uint32)
    starts = np.stack([_starts(f)[slot] for (_, f), slot in zip(tables, slots, strict=True)])
    offsets = (np.arange(1 << precision, dtype=np.int64) - starts).astype(np.uint32)
    if machine is None:
        return bool(_decode(words, symbols[0], steps[0], offsets[0], precision, codes))
    return bool(_decode_path(words, symbols, steps, offsets, precision, machine, codes))


@compiled
def _first_states(words):
    a = np.int64(words[0]) | np.int64(words[1]) << 16
    b = np.int64(words[2]) | np.int64(words[3]) << 16
    c = np.int64(words[4]) | np.int64(words[5]) << 16
    d = np.int64(words[6]) | np.int64(words[7]) << 16
    return a, b, c, d


@compiled
def _decode_path(words, symbols, steps, offsets, precision, machine, codes):
    if len(words) < 8:
        return False
    mask = (1 << precision) - 1
    a, b, c, d = _first_states(words)
    if min(a, b, c, d) < 1 << 16:
        return False
    at = 8
    place = np.int64(0)  # in the machine
    for i in range(len(codes)):
        slot = a & mask
        parity = place & 1
        code = symbols[parity, slot]
        codes[i] = code
        place = machine[place, (code - parity) >> 1 & 1]
        x = np.int64(steps[parity, slot]) * (a >> precision) + np.int64(offsets[parity, slot])
        if x < 1 << 16:
            if at == len(words):
                return False
            x = x << 16 | np.int64(words[at])
            at += 1
        a, b, c, d = b, c, d, x
    return at == len(words) and a == b == c == d == 1 << 16


@compiled
def _decode(words, symbols, steps, offsets, precision, codes):
    if len(words) < 8:
        return False
    mask = (1 << precision) - 1
    a, b, c, d = _first_states(words)
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
