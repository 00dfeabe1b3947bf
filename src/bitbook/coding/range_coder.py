"""The binary arithmetic coder: bits with given probabilities to bytes and back, in one function for both ways.

An interval `[low, low + span)` of 48-bit numbers shrinks with every bit; whenever it lies within 1/256 of the window,
a byte leaves it (Martin 1979, with carries into the bytes already written).  One function codes in both directions:
models are written once, and the decoder cannot disagree with the encoder.

The state is an int64 array, so that compiled models can hand it on: `coder[LOW]` and so on.
"""

from __future__ import annotations

import numpy as np

from bitbook.coding.compiled import compiled, inlined

LOW, SPAN, POSITION, OFFSET, DECODING = range(5)
WINDOW = 48
PRECISION = 16
"""Bits of a probability."""
ONE = 1 << PRECISION

_TOP = 1 << WINDOW
_SHRUNK = 1 << (WINDOW - 8)


def encoder() -> np.ndarray:
    """A fresh state that writes."""
    return np.array([0, _TOP, 0, 0, 0], np.int64)


def decoder(data: np.ndarray) -> np.ndarray:
    """A fresh state that reads `data`: uint8, writable for the type's sake; beyond its end there are zeros."""
    window = bytes(data[: WINDOW // 8]).ljust(WINDOW // 8, b"\0")
    return np.array([0, _TOP, WINDOW // 8, int.from_bytes(window, "big"), 1], np.int64)


@inlined
def code_bit(coder, buffer, bit, one):
    """Code a bit whose probability of being 1 is `one / 65536`, 0 < one < 65536; returns it.

    Reading, the bit that is given is ignored.  Writing beyond the buffer's end only counts bytes.
    """
    bound = (coder[SPAN] >> PRECISION) * (ONE - one)
    if coder[DECODING]:
        bit = 1 if coder[OFFSET] >= bound else 0
    if bit:
        start, span = bound, coder[SPAN] - bound
    else:
        start, span = np.int64(0), bound
    _narrow(coder, buffer, start, span)
    return bit


@compiled
def code_uniform(coder, buffer, symbol, alphabet):
    """Code a symbol of `alphabet` <= 65536 equally likely ones; returns it."""
    share = coder[SPAN] // alphabet
    if coder[DECODING]:
        symbol = min(coder[OFFSET] // share, alphabet - 1)
    if symbol < alphabet - 1:
        _narrow(coder, buffer, symbol * share, share)
    else:
        _narrow(coder, buffer, symbol * share, coder[SPAN] - symbol * share)
    return symbol


@inlined
def _narrow(coder, buffer, start, span):
    """Go to the part `[start, start + span)` of the interval, and let bytes that are certain leave the window."""
    coder[LOW] += start
    coder[SPAN] = span
    if coder[DECODING]:
        coder[OFFSET] -= start
    if coder[LOW] >= _TOP or span < _SHRUNK:  # seldom: a call of its own keeps what is inlined small
        _shift(coder, buffer)


@compiled
def _shift(coder, buffer):
    """Carry, and move the window by the bytes that are certain."""
    low, span, at, offset = coder[LOW], coder[SPAN], coder[POSITION], coder[OFFSET]
    decoding = coder[DECODING]
    if low >= _TOP:
        low -= _TOP
        if not decoding:
            _carry(buffer, at)
    while span < _SHRUNK:
        if decoding:
            offset = offset << 8 | (np.int64(buffer[at]) if at < len(buffer) else 0)
        elif at < len(buffer):
            buffer[at] = low >> (WINDOW - 8)
        at += 1
        low = low << 8 & (_TOP - 1)
        span <<= 8
    coder[LOW], coder[SPAN], coder[POSITION], coder[OFFSET] = low, span, at, offset


@compiled
def _carry(buffer, position):
    at = position - 1
    while at >= 0 and (at >= len(buffer) or buffer[at] == 255):
        if at < len(buffer):
            buffer[at] = 0
        at -= 1
    if at >= 0:
        buffer[at] += 1


def _shortest(low: int, span: int) -> int:
    """The number in `[low, low + span)` with the fewest bytes before the zeros at its end."""
    for zeros in range(WINDOW, -1, -8):
        number = -(-low >> zeros) << zeros
        if number < low + span:
            return number
    raise AssertionError("an interval is never empty")


def bits(coder: np.ndarray) -> float:
    """The information that was written so far, in bits; for an encoder's choices only."""
    return 8 * int(coder[POSITION]) + WINDOW - float(np.log2(int(coder[SPAN])))


def finish(coder: np.ndarray, buffer: np.ndarray) -> bytes | None:
    """All bytes, none of them a zero at the end; None where the buffer is shorter than `coder[POSITION]`."""
    position = int(coder[POSITION])
    if position > len(buffer):
        return None
    number = _shortest(int(coder[LOW]), int(coder[SPAN]))
    if number >= _TOP:
        number -= _TOP
        _carry(buffer, position)
    return (buffer[:position].tobytes() + number.to_bytes(WINDOW // 8, "big")).rstrip(b"\0")


def finished(coder: np.ndarray, data: np.ndarray) -> bool:
    """Whether `data`, after everything was read, ends exactly as `finish` would have ended it."""
    low, span = int(coder[LOW]), int(coder[SPAN])
    ends = _shortest(low, span) - low == int(coder[OFFSET])
    return ends and len(data) <= int(coder[POSITION]) and (len(data) == 0 or bool(data[-1]))
