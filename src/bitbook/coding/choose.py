"""The coder that makes each stream smallest, whichever it is; the first bytes of a group say which.

    streams ──► one coder for all, or      choices · Fixed's · Rans' · Context's streams ──► the shortest

`Context` goes on learning from stream to stream, so what a stream costs there depends on the others.  An encoder
starts with all streams there, moves those out that `Fixed` or `Rans` write in fewer bytes, and codes the rest again:
one more pass at most, instead of three to the power of the number of streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitbook.coding.coder import Coder
from bitbook.coding.context import CHOICES, Context, Profile
from bitbook.coding.fixed import Fixed, packed_size
from bitbook.coding.rans import Rans, costs_nothing
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Stream, StreamSpec

SMALL_LIMIT = 10_000_000
"""Symbols of a group beyond which the profile "small" is not tried, as decoding would take seconds."""

_SHARE = 256 // len(CHOICES)
_MIXED = CHOICES.index("Rans") * _SHARE + 1
"""The first byte of a group whose streams have several coders."""

_CODERS: Mapping[str, Coder] = {"Fixed": Fixed(), "Rans": Rans(), "Context": Context()}
_NAMES = tuple(_CODERS)
"""In the order of their bytes in a mixed group: where `Fixed` ends is known, where `Rans` does is in its bytes."""


@dataclass(frozen=True)
class Smallest:
    """`Fixed`, `Rans` or `Context` for each stream, by size; ties go to the faster.

    `Context` says in its first two bits what it is; before the bytes of the others stands one that says the same.
    A group of several coders begins with a byte of its own and a list of choices.
    """

    def encode(self, streams: Sequence[Stream]) -> bytes:
        return min(_candidates(streams), key=lambda data: (len(data), data[0:1] == bytes([_MIXED])), default=b"")

    def decode(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[Tensor]:
        segments, _ = _segments(data, specs)
        codes = {}
        for coder, part, members in segments:
            decoded = coder.decode(part, [specs[i] for i in members])
            codes |= zip(members, decoded, strict=True)
        return [codes[i] for i in range(len(specs))]

    def sizes(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[int]:
        """As every coder's; the bytes that say who wrote what are the first stream's."""
        segments, start = _segments(data, specs)
        sizes = {}
        for coder, part, members in segments:
            sizes |= zip(members, coder.sizes(part, [specs[i] for i in members]), strict=True)
        return [sizes[i] + (start if i == 0 else 0) for i in range(len(specs))]


def _candidates(streams: Sequence[Stream]) -> Iterator[bytes]:
    """The bytes of each choice that may be the best one, the faster first."""
    if not streams:
        return
    bounded = all(stream.spec.alphabet is not None for stream in streams)
    static = [_static(stream) for stream in streams]
    if bounded:
        yield _mark("Fixed") + b"".join(one["Fixed"] for one in static)
    yield _mark("Rans") + b"".join(one["Rans"] for one in static)
    names = [min(one, key=lambda name, one=one: len(one[name])) for one in static]
    if len(_used(names, streams)) > 1:
        yield _mixed(names, streams, static)
    symbols = sum(stream.codes.numel() for stream in streams)
    profiles: tuple[Profile, ...] = ("fast", "small") if symbols < SMALL_LIMIT else ("fast",)
    for profile in profiles:
        data, bits = Context(profile).measured(streams)
        yield data
        saved = [cost / 8 - len(one[name]) for cost, one, name in zip(bits, static, names, strict=True)]
        moved = [name if gain > 0 else "Context" for gain, name in zip(saved, names, strict=True)]
        enough = sum(gain for gain in saved if gain > 0) > 1 + packed_size(len(_NAMES), len(streams))
        if enough and {"Context"} < _used(moved, streams):
            yield _mixed(moved, streams, static, profile)


def _static(stream: Stream) -> dict[str, bytes]:
    """The bytes of a stream by each coder that learns nothing from other streams, the faster first."""
    names = ("Fixed", "Rans") if stream.spec.alphabet is not None else ("Rans",)
    return {name: _CODERS[name].encode([stream]) for name in names}


def _used(names: Sequence[str], streams: Sequence[Stream]) -> set[str]:
    return {name for name, stream in zip(names, streams, strict=True) if not costs_nothing(stream.spec)}


def _mixed(
    names: Sequence[str],
    streams: Sequence[Stream],
    static: Sequence[Mapping[str, bytes]],
    profile: Profile = "fast",
) -> bytes:
    """The group by several coders, `names` one for each stream; those that cost nothing are in no list."""
    pairs = [(name, i) for i, name in enumerate(names) if not costs_nothing(streams[i].spec)]
    choices = torch.tensor([[_NAMES.index(name) for name, _ in pairs]], dtype=torch.uint8)
    parts = [bytes([_MIXED]), Fixed().encode([Stream(_choices_spec(len(pairs)), choices)])]
    parts += [static[i][one] for one in ("Fixed", "Rans") for name, i in pairs if name == one]
    return b"".join(parts) + Context(profile).encode([streams[i] for name, i in pairs if name == "Context"])


def _mark(name: str) -> bytes:
    return bytes([CHOICES.index(name) * _SHARE])


def _choices_spec(count: int) -> StreamSpec:
    return StreamSpec("choices of coders", (1, count), len(_NAMES))


class _Segment(NamedTuple):
    """Bytes of one coder, and the places of its streams in the group."""

    coder: Coder
    data: memoryview
    members: Sequence[int]


def _segments(data: bytes | memoryview, specs: Sequence[StreamSpec]) -> tuple[list[_Segment], int]:
    """Who wrote which bytes, and how many of them say so; raises `CorruptArtifact` for any other mark."""
    data = memoryview(data)
    first = data[0] if len(data) else 0
    choice = CHOICES[first // _SHARE]
    everything = range(len(specs))
    if not specs or choice in ("small", "fast"):
        return [_Segment(Context(), data, everything)], 0
    if first == _MIXED:
        return _mixed_segments(data, specs)
    if first % _SHARE:
        raise CorruptArtifact(f"the codes begin with {first}, which names no coder")
    if choice == "Fixed" and any(spec.alphabet is None for spec in specs):
        raise CorruptArtifact("codes without a bound are said to be of fixed width")
    return [_Segment(_CODERS[choice], data[1:], everything)], 1


def _mixed_segments(data: memoryview, specs: Sequence[StreamSpec]) -> tuple[list[_Segment], int]:
    listed = [i for i, spec in enumerate(specs) if not costs_nothing(spec)]
    start = 1 + packed_size(len(_NAMES), len(listed))
    if len(data) < start:
        raise CorruptArtifact(f"{len(listed)} choices of coders do not fit into {len(data) - 1} bytes")
    (choices,) = Fixed().decode(data[1:start], [_choices_spec(len(listed))])
    chosen = dict(zip(listed, choices[0].tolist(), strict=True))
    if len(set(chosen.values())) < 2:
        raise CorruptArtifact("a group of several coders has only one")
    # What costs nothing goes to `Rans`, which writes nothing for it.
    fixed, rans, context = ([i for i in range(len(specs)) if chosen.get(i, 1) == k] for k in range(len(_NAMES)))
    if any(specs[i].alphabet is None for i in fixed):
        raise CorruptArtifact("codes without a bound are said to be of fixed width")
    size = sum(packed_size(specs[i].alphabet or 1, specs[i].grid[0] * specs[i].grid[1]) for i in fixed)
    middle = start + size
    end = middle + Rans().length(data[middle:], [specs[i] for i in rans])
    segments = [
        _Segment(Fixed(), data[start:middle], fixed),
        _Segment(Rans(), data[middle:end], rans),
        _Segment(Context(), data[end:], context),
    ]
    return segments, start
