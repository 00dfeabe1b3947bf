"""Fixed-width packing: every symbol costs the same, rounded up to whole bits as rarely as possible.

    symbols ──g at a time, base K──► words of w bits ──dense, least significant bit first──► bytes

Plain packing is g = 1, w = ceil(log2 K), the bytes of `np.packbits(bitorder="little")`.  Where K is no power
of two, several symbols as the digits of one number waste less: 15 levels cost 43/11 = 3.91 bits instead
of 4, and 3 levels 1.6 instead of 2.  Which of the two is used follows from K and the number of symbols.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8, UInt64
from torch import Tensor

from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import LARGEST_CODE, Stream, StreamSpec, code_dtype
from bitbook.trellis.viterbi import walk

LARGEST_ALPHABET = 1 << 32
"""Bit patterns of float32."""

_LANES = 64  # words of w bits that fill a whole number (w) of 64-bit integers, whatever w is
_MANY = 1 << 16  # codes of a stream for which compiled loops are worth their import
_CHUNK = 2048 * _LANES  # words that are packed at once; they fit into a processor's cache


@dataclass(frozen=True)
class Fixed:
    """The coder that needs no statistics; its sizes follow from the specs alone.

    Each stream starts at a byte.  The unused bits of its last byte are zero.
    """

    def encode(self, streams: Sequence[Stream]) -> bytes:
        return b"".join(_pack(checked(stream), _bounded(stream.spec)) for stream in streams)

    def decode(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[Tensor]:
        raw = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
        codes, start = [], 0
        for spec, size in zip(specs, self.sizes(data, specs), strict=True):
            codes.append(_unpack(raw[start : start + size], spec))
            start += size
        return codes

    def sizes(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[int]:
        sizes = [packed_size(_bounded(spec), spec.grid[0] * spec.grid[1]) for spec in specs]
        if sum(sizes) != len(data):
            raise CorruptArtifact(f"the codes take {sum(sizes)} bytes, but there are {len(data)}")
        return sizes


def _bounded(spec: StreamSpec) -> int:
    """The alphabet, which fixed width cannot do without."""
    if spec.alphabet is None:
        raise PlanError(f"{spec.name}: codes without a bound have no fixed width; use Smallest() or Context()")
    return spec.alphabet


def packed_size(alphabet: int, count: int) -> int:
    """Exact bytes of `count` symbols of an alphabet; raises `PlanError` for one outside 1…2^32."""
    return _bytes(_bits(*_packing(alphabet, count), alphabet, count))


@functools.cache
def grouping(alphabet: int) -> tuple[int, int]:
    """Symbols and bits per word, `(g, w)`: the least w/g with K^g <= 2^w and w <= 64; the least g on ties."""
    g, w = 1, (alphabet - 1).bit_length()
    for symbols in range(2, 64 // max(w - 1, 1) + 1):
        bits = (alphabet**symbols - 1).bit_length()
        if bits <= 64 and bits * g < w * symbols:
            g, w = symbols, bits
    return g, w


def _packing(alphabet: int, count: int) -> tuple[int, int]:
    """The `(g, w)` that is used: base K where it saves a byte, otherwise plain bits."""
    if not 1 <= alphabet <= LARGEST_ALPHABET:
        raise PlanError(f"an alphabet of {alphabet} symbols cannot be packed; it must be from 1 to 2^32")
    plain, grouped = (1, (alphabet - 1).bit_length()), grouping(alphabet)
    saves = _bytes(_bits(*grouped, alphabet, count)) < _bytes(_bits(*plain, alphabet, count))
    return grouped if saves else plain


def _bits(g: int, w: int, alphabet: int, count: int) -> int:
    full, tail = divmod(count, g)
    return full * w + (alphabet**tail - 1).bit_length()


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def checked(stream: Stream) -> np.ndarray:
    """The codes as one row of integers; raises `PlanError` where they are not what the spec says."""
    (name, grid, alphabet, _, states), codes = stream
    if codes.numel() != grid[0] * grid[1]:
        raise PlanError(f"{name}: {codes.numel()} codes do not fill the grid {grid}")
    if alphabet is not None and not 1 <= alphabet <= LARGEST_ALPHABET:
        raise PlanError(f"{name}: an alphabet of {alphabet} symbols cannot be coded; it must be from 1 to 2^32")
    least, end = (-LARGEST_CODE, LARGEST_CODE + 1) if alphabet is None else (0, alphabet)
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())  # a uint8 tensor would compare with 256 as with 0
        if low < least or high >= end:
            raise PlanError(f"{name}: codes from {low} to {high} are not all in [{least}, {end})")
    row = codes.cpu().numpy().reshape(-1)
    if states and walk(row, states) < 0:
        raise PlanError(f"{name}: the codes are no path through a machine of {states} states")
    return row


def _pack(codes: np.ndarray, alphabet: int) -> bytes:
    g, w = _packing(alphabet, codes.size)
    if w == 0:
        return b""
    if g == 1 and w in (8, 16, 32):
        return codes.astype(f"<u{w // 8}").tobytes()
    chunks = (codes[i : i + g * _CHUNK] for i in range(0, codes.size, g * _CHUNK))
    packed = b"".join(_pack_words(_join_digits(chunk, alphabet, g), w) for chunk in chunks)
    return packed[: packed_size(alphabet, codes.size)]


def _unpack(raw: UInt8[np.ndarray, " bytes"], spec: StreamSpec) -> Tensor:
    name, grid, alphabet = spec.name, spec.grid, _bounded(spec)
    count = grid[0] * grid[1]
    dtype = code_dtype(alphabet)
    g, w = _packing(alphabet, count)
    if count == 0 or w == 0:
        return torch.zeros(grid, dtype=dtype)
    used = _bits(g, w, alphabet, count) % 8
    if used and raw[-1] >> used:
        raise CorruptArtifact(f"{name}: the unused bits of the last byte are not zero")
    if g == 1 and w in (8, 16, 32):
        codes = torch.from_numpy(raw.view(f"<u{w // 8}").astype(np.int64 if w == 32 else np.int32)).to(dtype)
    else:
        codes = torch.empty(count, dtype=dtype)
        for i in range(0, count, g * _CHUNK):
            size = min(g * _CHUNK, count - i)
            start = i // g * w // 8
            packed = _aligned(raw[start : start + _CHUNK * w // 8], w)
            if count >= _MANY and alphabet < 1 << 31:
                from bitbook.coding.fixed_loops import unpack

                if not unpack(packed, w, alphabet, g, codes.numpy()[i : i + size]):
                    raise CorruptArtifact(f"{name}: a packed group is not of {alphabet} symbols")
                continue
            words = _unpack_words(packed, w)[: -(-size // g)]
            codes.numpy()[i : i + size] = _split_digits(words, alphabet, g, size, name)
    if g == 1 and (high := int(codes.max())) >= alphabet:
        raise CorruptArtifact(f"{name}: code {high} is not in [0, {alphabet})")
    return codes.reshape(grid)


def _join_digits(codes: np.ndarray, alphabet: int, g: int) -> UInt64[np.ndarray, " words"]:
    """Each g symbols as one number in base K, the first symbol the least digit; missing ones are zero."""
    if g == 1:
        return codes.astype(np.uint64)
    digits = np.zeros((-(-codes.size // g), g), codes.dtype)
    digits.reshape(-1)[: codes.size] = codes
    words = np.zeros(len(digits), np.uint64)
    for i in reversed(range(g)):
        words = words * np.uint64(alphabet) + digits[:, i].astype(np.uint64)
    return words


def _split_digits(words: UInt64[np.ndarray, " words"], alphabet: int, g: int, count: int, name: str) -> np.ndarray:
    """Undo `_join_digits`; raises `CorruptArtifact` for a number that has more digits than symbols."""
    if g == 1:
        return words
    digits = np.empty((len(words), g), np.uint64 if alphabet > 1 << 16 else np.uint16)
    for i in range(g):
        quotient = words // np.uint64(alphabet)
        digits[:, i] = words - quotient * np.uint64(alphabet)
        words = quotient
    if words.any() or digits.reshape(-1)[count:].any():
        raise CorruptArtifact(f"{name}: a packed group is not of {alphabet} symbols")
    return digits.reshape(-1)[:count]


def _pack_words(words: UInt64[np.ndarray, " words"], w: int) -> bytes:
    """Words of w bits, dense; zeros fill up to a whole number of lanes."""
    lanes = np.zeros((-(-words.size // _LANES), _LANES), np.uint64)
    lanes.reshape(-1)[: words.size] = words
    packed = np.zeros((len(lanes), w), "<u8")
    for lane in range(min(_LANES, words.size)):
        column, shift = divmod(lane * w, 64)
        packed[:, column] |= lanes[:, lane] << np.uint64(shift)
        if shift + w > 64:
            packed[:, column + 1] |= lanes[:, lane] >> np.uint64(64 - shift)
    return packed.tobytes()


def _aligned(raw: UInt8[np.ndarray, " bytes"], w: int) -> UInt64[np.ndarray, "rows w"]:
    """The bytes of `_pack_words` as its integers; missing ones are zeros, so there may be more than were packed."""
    rows = -(-raw.size // (8 * w))
    padded = np.zeros(rows * 8 * w, np.uint8)
    padded[: raw.size] = raw
    return padded.view("<u8").reshape(rows, w)


def _unpack_words(packed: UInt64[np.ndarray, "rows w"], w: int) -> UInt64[np.ndarray, " words"]:
    """Undo `_pack_words`."""
    mask = np.uint64((1 << w) - 1)
    lanes = np.empty((len(packed), _LANES), np.uint64)
    for lane in range(_LANES):
        column, shift = divmod(lane * w, 64)
        word = packed[:, column] >> np.uint64(shift)
        if shift + w > 64:
            word |= packed[:, column + 1] << np.uint64(64 - shift)
        lanes[:, lane] = word & mask
    return lanes.reshape(-1)
