"""Format 1: one safetensors entry per tensor, so that any of them can be read alone; the plan is in the header.

length · header {__metadata__: {bitbook, crc32, plan}, name: place, …} · dense entries · coded entries
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from bitbook.artifact.artifact import INPUTS, METADATA, Artifact
from bitbook.artifact.contents import (
    DTYPES,
    NEWEST,
    Coded,
    Dense,
    File,
    Group,
    Part,
    Plan,
    Room,
    about,
    as_object,
    canonical,
    check_aliases,
    check_canonical,
    coded_tensors,
    dense_bytes,
    dense_type,
    input_parts,
    input_streams,
    is_coded,
    parse_json,
    plan_json,
    read_claims,
    read_plan,
    streams_of,
)
from bitbook.artifact.span import Span
from bitbook.blocks import Shape
from bitbook.coding.coder import Coder
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Quantized

FORMAT = 1
DEFAULT_CODER = "Fixed"
"""The coder of a file that names none."""

_NO_CRC = "0" * 8


class Entry(NamedTuple):
    """One tensor of the file, by what the header says of it."""

    dtype: str
    shape: Shape
    coded: bool

    @classmethod
    def of_codes(cls, size: int) -> Entry:
        """The entry of a group of `size` bytes."""
        return cls("U8", (size,), True)

    @property
    def size(self) -> int:
        """Its bytes."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


def build(artifact: Artifact, coder: Coder) -> bytes:
    """The bytes of a file; raises `PlanError` for what the format does not have."""
    entries: dict[str, Entry] = {}
    contents: dict[str, bytes] = {}
    for name, tensor in artifact.tensors.items():
        if isinstance(tensor, Quantized) and is_coded(tensor):
            contents[name] = coder.encode(streams_of(name, tensor))
            entries[name] = Entry.of_codes(len(contents[name]))
        else:
            contents[name] = dense_bytes(tensor)
            entries[name] = Entry(dense_type(name, tensor), tuple(tensor.shape), False)
    if streams := input_streams(artifact):
        contents[INPUTS] = coder.encode(streams)
        entries[INPUTS] = Entry.of_codes(len(contents[INPUTS]))
    file = io.BytesIO()
    write(file, entries, plan_json(artifact, coder, DEFAULT_CODER, dense=False), lambda name: [contents[name]])
    return file.getvalue()


def write(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    plan: Mapping[str, Any],
    content: Callable[[str], Iterable[bytes | memoryview]],
) -> None:
    """Write all entries into an empty file, each in pieces as `content` gives them; the checksum is filled in last."""
    index, metadata = _front(entries, plan)
    header = _header_bytes(index, metadata)
    file.write(header)
    crc = zlib.crc32(header)
    for name in index:
        size = 0
        for piece in content(name):
            file.write(piece)
            crc = zlib.crc32(piece, crc)
            size += len(piece)
        assert size == entries[name].size, f"{name}: {size} bytes instead of {entries[name].size}"
    file.seek(0)
    file.write(_header_bytes(index, {**metadata, "crc32": f"{crc:08x}"}))


def header_size(entries: Mapping[str, Entry], plan: Mapping[str, Any]) -> int:
    """The bytes before the data of a file with these entries."""
    return len(_header_bytes(*_front(entries, plan)))


def _front(entries: Mapping[str, Entry], plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The index, in the order of the file, and the metadata, without a checksum yet."""
    index: dict[str, Any] = {}
    start = 0
    coded = [name for name, entry in entries.items() if entry.coded]
    for name in _file_order({name: entry.dtype for name, entry in entries.items()}, coded):
        dtype, shape, _ = entry = entries[name]
        index[name] = {"data_offsets": [start, start + entry.size], "dtype": dtype, "shape": list(shape)}
        start += entry.size
    return index, {"bitbook": str(FORMAT), "crc32": _NO_CRC, "plan": canonical(plan).decode()}


def parse(text: bytes, payload: Span, room: Room) -> File:
    """What the header's text and the data behind it say; raises `CorruptArtifact`."""
    body = text.rstrip(b" ")
    index = as_object(parse_json(body, "the header"), "the header")
    metadata = _metadata(index.get(METADATA))
    check_canonical(body, index, "the header")
    if len(text) != len(body) + _padding(len(body)):
        raise CorruptArtifact("the header is not padded with spaces to the next multiple of 8 bytes")
    del index[METADATA]
    if metadata["crc32"] != _checksum(index, metadata, payload):
        raise CorruptArtifact("the checksum does not match: the file was altered after it was written")
    plan = read_plan(metadata["plan"].encode(), DEFAULT_CODER, dense=False)
    entries = list(_entries(index, plan, payload, room))
    check_aliases(plan, index)
    own = len(canonical(index))
    parts = {"length": 8, "index": own, "plan": len(body) - own, "padding": len(text) - len(body)}
    return File(parts, plan, entries)


def _metadata(value: Any) -> dict[str, str]:
    metadata = {} if value is None else as_object(value, METADATA)
    version = metadata.get("bitbook")
    if version is None:
        raise CorruptArtifact("this is no bitbook file: its header does not say 'bitbook'")
    if version != str(FORMAT):
        shown = str(version)[:20]
        if isinstance(version, str) and re.fullmatch("[1-9][0-9]{0,5}", version) and int(version) > NEWEST:
            raise CorruptArtifact(f"written by a newer bitbook, in format {shown}; this one reads up to {NEWEST}")
        raise CorruptArtifact(f"unknown format version {shown!r}; a file of several entries says {str(FORMAT)!r}")
    if metadata.keys() != {"bitbook", "crc32", "plan"} or any(type(v) is not str for v in metadata.values()):
        raise CorruptArtifact(f"{METADATA} does not hold the texts 'bitbook', 'crc32', 'plan' and no others")
    return metadata


def _entries(index: Mapping[str, Any], plan: Plan, payload: Span, room: Room) -> Iterator[Dense | Group]:
    """All entries in file order, which leaves exactly one place for each."""
    groups: dict[str, tuple[Sequence[Coded], Sequence[Part]]] = {}
    groups |= {tensor.name: ([tensor], ()) for tensor in coded_tensors(plan, room)}
    inputs = input_parts(plan, room)
    if INPUTS in index and not inputs:
        raise CorruptArtifact(f"{INPUTS} can only hold the side tensors of inputs, and the plan names none")
    if inputs:
        groups[INPUTS] = (), inputs
    if missing := sorted(groups.keys() - index.keys()):
        raise CorruptArtifact(f"{missing[0]} is in the plan, but not in the index")
    claims = read_claims(index)
    start = 0
    for name in _file_order({name: dtype for name, (dtype, _, _) in claims.items()}, groups):
        with about(name):
            dtype, shape, offsets = claims[name]
            stop = start + DTYPES[dtype].itemsize * math.prod(shape)
            if offsets != [start, stop] or any(type(n) is not int for n in offsets) or stop > len(payload):
                raise CorruptArtifact(
                    f"its data is said to be at {str(offsets)[:80]}, but without holes and overlaps it is at "
                    f"[{start}, {stop}], and {len(payload)} bytes are there"
                )
            data, start = payload.part(start, stop), stop
            if name not in groups:
                room.take(shape)
                yield Dense(name, dtype, shape, data)
            elif dtype != "U8" or len(shape) != 1:
                raise CorruptArtifact("its codes are not one row of type U8")
            else:
                yield Group(name, data, *groups[name])
    if start != len(payload):
        raise CorruptArtifact(f"the entries end at {start}, but there are {len(payload)} bytes of data")


def _padding(size: int) -> int:
    """Spaces that fill a header up to a multiple of 8 bytes, so that the data behind it is aligned."""
    return -size % 8


def _header_bytes(index: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The header, with its length before and its padding behind."""
    text = canonical({**index, METADATA: metadata})
    size = len(text) + _padding(len(text))
    return size.to_bytes(8, "little") + text.ljust(size)


def _checksum(index: Mapping[str, Any], metadata: Mapping[str, str], payload: Span) -> str:
    """CRC-32 of the whole file with the checksum's own 8 digits taken as zeros, as 8 hex digits."""
    crc = zlib.crc32(_header_bytes(index, {**metadata, "crc32": _NO_CRC}))
    for piece in payload.chunks():
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def _file_order(dtypes: Mapping[str, str], coded: Collection[str]) -> list[str]:
    """Dense entries by falling alignment, then coded ones, by name where equal: so all are aligned."""
    return sorted(dtypes, key=lambda name: (name in coded, -DTYPES[dtypes[name]].itemsize, name))
