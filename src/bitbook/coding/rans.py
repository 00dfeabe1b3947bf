"""Static rANS: a table of frequencies, then words that four interleaved states share; made for speed.

    stream ──► size of table · table · number of words · 16-bit words          (no table: fixed width)

Asymmetric numeral systems (Duda 2013) with 32-bit states and 16-bit words (Giesen 2014).  Symbol i belongs to state
i mod 4.  Symbols are coded from the last to the first and written in reverse, so that decoding runs forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitbook.coding.fixed import Fixed, checked, packed_size
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import LARGEST_CODE, Stream, StreamSpec, code_dtype
from bitbook.trellis.machine import next_states
from bitbook.trellis.viterbi import walk

LANES = 4
_LOWEST = 1 << 16  # of a state between symbols
_PRECISIONS = (12, 14, 16)  # bits of a frequency that an encoder tries: 12 rounds rare symbols, 16 leaves states coarse
_MOST_SYMBOLS = 1 << 12  # different ones
_NEAR = 1 << 16  # distance of the smallest and the largest symbol up to which a table has a place for each
_CHUNK = 1 << 18  # codes that are looked at together


@dataclass(frozen=True)
class Rans:
    """Static entropy coding at order 0: a stream costs its entropy, its table and some 20 bytes.

    Streams for which that is more than fixed width, or with more than 4,096 different symbols, are stored at fixed
    width. What tables an encoder chooses is its business; given them, exactly one sequence of bytes is accepted.
    """

    def encode(self, streams: Sequence[Stream]) -> bytes:
        return b"".join(_encode(stream) for stream in streams)

    def decode(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[Tensor]:
        return [_decode(part, spec) for part, spec in zip(_whole(data, specs), specs, strict=True)]

    def sizes(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[int]:
        return [sum(map(len, part)) for part in _whole(data, specs)]

    def length(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> int:
        """How many bytes at the start of `data` hold these streams; raises `CorruptArtifact` where they are cut off."""
        return sum(len(piece) for part in _split(data, specs)[0] for piece in part)


_Part = tuple[memoryview, memoryview, memoryview, memoryview]
"""A stream's bytes: size of table, table, number of words, words or codes."""


def _whole(data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[_Part]:
    """The parts of `data`, which must hold nothing else."""
    parts, rest = _split(data, specs)
    if rest:
        raise CorruptArtifact(f"{len(rest)} bytes are left behind the codes")
    return parts


def _split(data: bytes | memoryview, specs: Sequence[StreamSpec]) -> tuple[list[_Part], memoryview]:
    """The parts of the streams at the start of `data`, and what is left behind them."""
    rest = memoryview(data)
    nothing = rest[:0]
    parts = []
    for spec in specs:
        if costs_nothing(spec):
            parts.append((nothing, nothing, nothing, nothing))
            continue
        table_size, used = _read_number(rest, spec.name)
        head, rest = rest[:used], rest[used:]
        if len(rest) < table_size:
            raise CorruptArtifact(f"{spec.name}: a table of {table_size} bytes does not fit into {len(rest)}")
        table, rest = rest[:table_size], rest[table_size:]
        words, used = _read_number(rest, spec.name) if table_size else (0, 0)
        count, rest = rest[:used], rest[used:]
        size = 2 * words if table_size else packed_size(_width(spec), spec.grid[0] * spec.grid[1])
        if len(rest) < size:
            raise CorruptArtifact(f"{spec.name}: codes of {size} bytes do not fit into {len(rest)}")
        parts.append((head, table, count, rest[:size]))
        rest = rest[size:]
    return parts, rest


def costs_nothing(spec: StreamSpec) -> bool:
    """Whether the specification leaves nothing to say: no symbols, or only one that there could be."""
    return spec.grid[0] * spec.grid[1] == 0 or spec.alphabet == 1


def _width(spec: StreamSpec) -> int:
    """The alphabet at fixed width; without a bound, codes are stored modulo 2^32."""
    return 1 << 32 if spec.alphabet is None else spec.alphabet


def _plain(stream: Stream) -> Stream:
    spec, codes = stream
    if spec.alphabet is None:
        codes = codes.long() & (1 << 32) - 1
    return Stream(StreamSpec(spec.name, spec.grid, _width(spec)), codes)


def _encode(stream: Stream) -> bytes:
    codes = checked(stream)
    if costs_nothing(stream.spec):
        return b""
    least = 1 + packed_size(_width(stream.spec), codes.size)
    best: bytes | None = None
    counted = _counted(codes, stream.spec)
    most = max(len(symbols) for symbols, _ in counted)
    for precision in _PRECISIONS if most <= _MOST_SYMBOLS else ():
        if most > 1 << (precision - 1):
            continue
        frequencies = [_quantized(counts, precision) for _, counts in counted]
        pairs = list(zip(counted, frequencies, strict=True))
        ideal = sum((counts * (precision - np.log2(f))).sum() for (_, counts), f in pairs) / 8
        if ideal + 2 * LANES * 2 >= least:
            continue
        table = b"".join(_table(symbols, f, precision) for (symbols, _), f in pairs)
        from bitbook.coding.rans_loops import encode

        words = encode(codes, _indices([symbols for symbols, _ in counted]), frequencies, precision)
        data = b"".join([_number(len(table)), table, _number(len(words)), words.astype("<u2", copy=False).data])
        if len(data) < least:
            best, least = data, len(data)
    return b"\0" + Fixed().encode([_plain(stream)]) if best is None else best


def _counted(codes: np.ndarray, spec: StreamSpec) -> list[tuple[np.ndarray, np.ndarray]]:
    """The different symbols and how often each is there: of all codes, or of the even ones and the odd ones apart."""
    symbols, counts = _frequencies(codes)
    if not spec.states:
        return [(symbols, counts)]
    found = []
    for parity in (0, 1):
        own = symbols & 1 == parity
        found.append((symbols[own], counts[own]) if own.any() else (np.array([parity]), np.array([1])))
    return found


def _frequencies(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` with counts; where symbols are near each other, without sorting and in little memory."""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= _NEAR:
        return np.unique(codes, return_counts=True)
    counts = np.zeros(high - low + 1, np.int64)
    for start in range(0, len(codes), _CHUNK):
        counts += np.bincount(codes[start : start + _CHUNK].astype(np.int64) - low, minlength=len(counts))
    (present,) = counts.nonzero()
    return (present + low).astype(codes.dtype), counts[present]


def _indices(tables: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """What says where codes stand in the tables, one after the other."""
    symbols = np.concatenate(tables).astype(np.int64)
    low, high = int(symbols.min()), int(symbols.max())
    if high - low < _NEAR:
        places = np.zeros(high - low + 1, np.int32)
        places[symbols - low] = np.arange(len(symbols))
        return lambda codes: places[codes.astype(np.int64) - low]
    order = np.argsort(symbols)
    return lambda codes: order[np.searchsorted(symbols, codes, sorter=order)].astype(np.int32)


def _decode(part: _Part, spec: StreamSpec) -> Tensor:
    head, table, _, data = part
    count = spec.grid[0] * spec.grid[1]
    dtype = code_dtype(spec.alphabet)
    if not head:
        return torch.zeros(spec.grid, dtype=dtype)
    if not table:
        (codes,) = Fixed().decode(data, [StreamSpec(spec.name, spec.grid, _width(spec))])
        if spec.alphabet is None:
            codes = torch.where(codes >= 1 << 31, codes - (1 << 32), codes)
            if int(codes.min()) < -LARGEST_CODE:
                raise CorruptArtifact(f"{spec.name}: a code of -2^31")
        if spec.states and walk(codes.numpy().reshape(-1), spec.states) < 0:
            raise CorruptArtifact(f"{spec.name}: the codes are no path through a machine of {spec.states} states")
        return codes.to(dtype)
    from bitbook.coding.rans_loops import decode

    tables, precision = _read_tables(table, spec)
    codes = torch.empty(count, dtype=dtype).numpy()
    words = np.frombuffer(data, "<u2").astype(np.uint16, copy=False)
    machine = next_states(spec.states) if spec.states else None
    if not decode(words, tables, precision, machine, codes):
        raise CorruptArtifact(f"{spec.name}: the {len(words)} words are not of these codes")
    return torch.from_numpy(codes).reshape(spec.grid)


def _quantized(counts: np.ndarray, precision: int) -> np.ndarray:
    """Frequencies that add up to 2^precision, none of them zero, near the counts."""
    total = 1 << precision
    exact = counts.astype(np.float64) * (total / counts.sum())
    frequencies = np.maximum(np.rint(exact), 1).astype(np.int64)
    while excess := int(frequencies.sum()) - total:
        step = 1 if excess < 0 else -1
        # The symbols that lose least, or gain most, by one more or less.
        movable = frequencies > 1 if step < 0 else frequencies > 0
        gain = np.where(movable, counts * np.log2(np.maximum(frequencies + step, 0.5) / frequencies), -np.inf)
        order = np.argsort(-gain, kind="stable")[: min(abs(excess), int(movable.sum()))]
        frequencies[order] += step
    return frequencies


def _table(symbols: np.ndarray, frequencies: np.ndarray, precision: int) -> bytes:
    """Precision, number of symbols, then the gaps between symbols and their frequencies as variable-length numbers."""
    first = int(symbols[0])
    parts = [bytes([precision]), _number(len(symbols)), _number(2 * first if first >= 0 else -2 * first - 1)]
    gaps = np.diff(symbols.astype(np.int64)) - 1
    dense = not gaps.any()
    parts.append(bytes([int(dense)]))
    if not dense:
        parts.extend(_number(int(gap)) for gap in gaps)
    parts.extend(_number(int(f)) for f in frequencies[:-1] - 1)  # the last follows from the sum
    return b"".join(parts)


def _read_tables(table: memoryview, spec: StreamSpec) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Symbols and frequencies of the stream, or of its even and its odd codes; and the precision."""
    tables, precision, at = [], table[0], 0
    for parity in (0, 1) if spec.states else (None,):
        if at >= len(table) or table[at] != precision:
            raise CorruptArtifact(f"{spec.name}: the table of frequencies is not one")
        symbols, frequencies, used = _read_table(table[at:], spec)
        if parity is not None and (symbols & 1 != parity).any():
            raise CorruptArtifact(f"{spec.name}: even and odd codes share a table of frequencies")
        tables.append((symbols, frequencies))
        at += used
    if at != len(table):
        raise CorruptArtifact(f"{spec.name}: the table of frequencies is not one")
    return tables, precision


def _read_table(table: memoryview, spec: StreamSpec) -> tuple[np.ndarray, np.ndarray, int]:
    """Symbols, frequencies, and how many bytes said so."""
    name = spec.name
    precision, at = table[0], 1
    if precision not in _PRECISIONS:
        raise CorruptArtifact(f"{name}: frequencies of {precision} bits")

    def number() -> int:
        nonlocal at
        value, used = _read_number(table[at : at + 5], name)
        at += used
        return value

    count = number()
    if not 1 <= count <= min(len(table), _MOST_SYMBOLS, 1 << precision):
        raise CorruptArtifact(f"{name}: a table of {count} symbols in {len(table)} bytes")
    folded = number()
    symbols = [folded // 2 if folded % 2 == 0 else -(folded + 1) // 2]
    dense = number()
    for _ in range(count - 1):
        symbols.append(symbols[-1] + 1 + (0 if dense else number()))
    gapless = symbols[-1] - symbols[0] == count - 1
    frequencies = [number() + 1 for _ in range(count - 1)]
    frequencies.append((1 << precision) - sum(frequencies))
    least, most = (-LARGEST_CODE, LARGEST_CODE) if spec.alphabet is None else (0, spec.alphabet - 1)
    if frequencies[-1] < 1 or dense != gapless or symbols[0] < least or symbols[-1] > most:
        raise CorruptArtifact(f"{name}: the table of frequencies is not one")
    small = symbols[0] >= -(1 << 31) and symbols[-1] < 1 << 31
    return np.array(symbols, np.int32 if small else np.int64), np.array(frequencies, np.int64), at


def _number(value: int) -> bytes:
    """Seven bits per byte, least significant first; the top bit says that more follow."""
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _read_number(data: memoryview, name: str) -> tuple[int, int]:
    """A number and the bytes it took; raises `CorruptArtifact` for none, one beyond 2^35 or one in too many bytes."""
    value = 0
    for i, byte in enumerate(data[:5]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if i and not byte:
                break
            return value, i + 1
    raise CorruptArtifact(f"{name}: a number is cut off or too long")
