"""Codes at their own width in 32-bit words, in the layout that products are computed from.

    codes (rows, cols) ──► words (blocks of 16 rows, words, 16 lanes)      row 16 b + l: lane l of block b

Code k of a row takes the bits k · bits … of the row's words, least significant first.  `native.c` reads 16 rows with
one instruction.  A grid of fewer rows than lanes may be folded: laid out as 16 rows that together hold its codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bitbook.quantizer import StreamSpec, code_dtype
from bitbook.runtime import native
from bitbook.runtime.loops import LANES, loops

_SMALL = 1 << 16  # codes of a task that is worth a thread


class Unit(NamedTuple):
    """The fewest codes that fill whole words."""

    codes: int
    words: int

    @classmethod
    def of(cls, bits: int) -> Unit:
        codes = 32 // math.gcd(bits, 32)
        return cls(codes, codes * bits // 32)


class PackedCodes(nn.Module):
    """One stream of codes, each at the width that the largest of them needs.

    Attributes:
        words: int32, `(row blocks, words, LANES)`.
        bits: of a code, 1 to 32.
        low: what is added to the bits to get the code; 0 for codes of an alphabet.
        rows, cols: of the layout, the grid's own unless it has few rows.
    """

    words: Tensor

    def __init__(self, codes: Int[Tensor, "rows cols"], spec: StreamSpec, *, fold: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.grid = (int(codes.shape[0]), int(codes.shape[1]))
        self.low, self.bits = _width(codes, spec)
        if fold and self.grid[0] < LANES:
            self.rows, self.cols = LANES, -(-codes.numel() // LANES)
            flat = codes.new_full((self.rows * self.cols,), self.low)
            flat[: codes.numel()] = codes.reshape(-1)
            codes = flat.reshape(self.rows, self.cols)
        else:
            self.rows, self.cols = self.grid
        self.register_buffer("words", pack(codes, self.low, self.bits))

    @property
    def by_row(self) -> bool:
        """Whether a row of the layout is a row of the grid."""
        return (self.rows, self.cols) == self.grid

    def unpack(self, start: int = 0, stop: int | None = None) -> Int[Tensor, "some cols"]:
        """Rows of the grid, in the type in which quantizers expect them."""
        dtype = code_dtype(self.spec.alphabet)
        stop = self.grid[0] if stop is None else stop
        if self.by_row:
            return unpack(self.words, start, stop, self.cols, self.bits, self.low, dtype)
        everything = unpack(self.words, 0, self.rows, self.cols, self.bits, self.low, dtype).reshape(-1)
        return everything[: self.grid[0] * self.grid[1]].reshape(self.grid)[start:stop]

    def select(self, index: Int[Tensor, " some"]) -> Int[Tensor, "some cols"]:
        """Rows of the grid by their numbers."""
        if not self.by_row:
            return self.unpack()[index]
        words = self.words[index // LANES, :, index % LANES]
        return _unpack_words(words, self.cols, self.bits, self.low, code_dtype(self.spec.alphabet))

    def extra_repr(self) -> str:
        return f"{self.grid[0]} × {self.grid[1]} codes of {self.bits} bits"


def _width(codes: Tensor, spec: StreamSpec) -> tuple[int, int]:
    """The least code, and the bits that the others then need; those of an alphabet start at zero."""
    if spec.alphabet is not None:
        return 0, max((spec.alphabet - 1).bit_length(), 1)
    low, high = int(codes.min()), int(codes.max())
    return low, max((high - low).bit_length(), 1)


def threads_for(codes: int) -> int:
    """How many of torch's threads packing or unpacking so many is worth."""
    return min(torch.get_num_threads(), 1 + codes // _SMALL)


def pack(codes: Int[Tensor, "rows cols"], low: int, bits: int) -> Int[Tensor, "blocks words lanes"]:
    """Codes of `bits` bits after `low` is taken away; the layout's padding is zeros."""
    rows, cols = codes.shape
    unit = Unit.of(bits)
    shape = (-(-rows // LANES), -(-cols // unit.codes) * unit.words, LANES)
    if codes.is_cpu and codes.dtype in (torch.uint8, torch.int32):
        codes, words = codes.contiguous(), torch.zeros(shape, dtype=torch.int32)
        if (library := native.compiled()) is not None:
            size, threads = codes.itemsize, threads_for(codes.numel())
            library.pack(codes.data_ptr(), size, low, rows, cols, bits, words.data_ptr(), threads)
            return words
        if (compiled := loops()) is not None:
            compiled.pack(codes.numpy(), low, bits, words.numpy().view("uint32"))
            return words
    padded = codes.new_zeros((shape[0] * LANES, shape[1] // unit.words * unit.codes), dtype=torch.int64)
    padded[:rows, :cols] = codes.long() - low
    fields = padded.reshape(len(padded), -1, unit.codes)
    words = padded.new_zeros((len(padded), fields.shape[1], unit.words + 1))
    for k in range(unit.codes):
        at, shift = divmod(k * bits, 32)
        moved = fields[:, :, k] << shift
        words[:, :, at] |= moved & 0xFFFFFFFF
        words[:, :, at + 1] |= moved >> 32
    flat = words[:, :, : unit.words].reshape(shape[0], LANES, shape[1])
    return flat.transpose(1, 2).contiguous().to(torch.int32)  # the upper half of 32 bits wraps to negative numbers


def unpack(
    words: Int[Tensor, "blocks words lanes"], start: int, stop: int, cols: int, bits: int, low: int, dtype: torch.dtype
) -> Int[Tensor, "some cols"]:
    """Rows `start` to `stop` of what `pack` made."""
    if words.is_cpu and dtype in (torch.uint8, torch.int32) and not torch.compiler.is_compiling():
        codes = torch.empty(stop - start, cols, dtype=dtype)
        if (library := native.compiled()) is not None:
            size, threads = codes.itemsize, threads_for(codes.numel())
            library.unpack(words.data_ptr(), start, stop, cols, bits, low, codes.data_ptr(), size, threads)
            return codes
        if (compiled := loops()) is not None:
            compiled.unpack(words.numpy().view("uint32"), start, low, bits, codes.numpy())
            return codes
    own = words[start // LANES : -(-stop // LANES)].transpose(1, 2).reshape(-1, words.shape[1])
    first = start % LANES
    return _unpack_words(own[first : first + stop - start], cols, bits, low, dtype)


def _unpack_words(
    words: Int[Tensor, "some words"], cols: int, bits: int, low: int, dtype: torch.dtype
) -> Int[Tensor, "some cols"]:
    unit = Unit.of(bits)
    parts = (words.long() & 0xFFFFFFFF).reshape(len(words), words.shape[1] // unit.words, unit.words)
    fields = []
    for k in range(unit.codes):
        at, shift = divmod(k * bits, 32)
        value = parts[:, :, at] >> shift
        if shift + bits > 32:
            value = value | parts[:, :, at + 1] << (32 - shift)
        fields.append(value & (1 << bits) - 1)
    codes = torch.stack(fields, 2).reshape(len(words), parts.shape[1] * unit.codes)[:, :cols]
    return (codes + low).to(dtype)
