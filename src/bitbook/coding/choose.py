"""The coder that makes a group smallest, whichever it is; the first two bits of its bytes say which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bitbook.coding.coder import Coder
from bitbook.coding.context import CHOICES, Context
from bitbook.coding.fixed import Fixed
from bitbook.coding.rans import Rans
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Stream, StreamSpec

SMALL_LIMIT = 10_000_000
"""Symbols of a group beyond which the profile "small" is not tried, as decoding would take seconds."""

_SHARE = 256 // len(CHOICES)


@dataclass(frozen=True)
class Smallest:
    """`Fixed`, `Rans` or `Context` for each group, by size; ties go to the faster.

    `Context` says in its first two bits what it is; before the bytes of the others stands one that says the same.
    """

    def encode(self, streams: Sequence[Stream]) -> bytes:
        if not streams:
            return b""
        symbols = sum(stream.codes.numel() for stream in streams)
        candidates = [_mark("Rans") + Rans().encode(streams), Context("fast").encode(streams)]
        if all(stream.spec.alphabet is not None for stream in streams):
            candidates.insert(0, _mark("Fixed") + Fixed().encode(streams))
        if symbols < SMALL_LIMIT:
            candidates.append(Context("small").encode(streams))
        return min(candidates, key=len)

    def decode(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[Tensor]:
        coder, start = _coder(data, specs)
        return coder.decode(memoryview(data)[start:], specs)

    def sizes(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[int]:
        coder, start = _coder(data, specs)
        sizes = coder.sizes(memoryview(data)[start:], specs)
        return [sizes[0] + start, *sizes[1:]] if sizes else []


def _mark(name: str) -> bytes:
    return bytes([CHOICES.index(name) * _SHARE])


def _coder(data: bytes | memoryview, specs: Sequence[StreamSpec]) -> tuple[Coder, int]:
    """Who wrote the bytes, and how many of them say so; raises `CorruptArtifact` for any other mark."""
    first = data[0] if len(data) else 0
    choice = CHOICES[first // _SHARE]
    if not specs or choice in ("small", "fast"):
        return Context(), 0
    if first % _SHARE:
        raise CorruptArtifact(f"the codes begin with {first}, which names no coder")
    return {"Rans": Rans(), "Fixed": Fixed()}[choice], 1
