"""Format 2: the whole model in one safetensors entry, with nothing in it twice.

length · header {"bitbook": place} · format · crc32 · plan's length · plan · codes, one group · dense tensors
"""

from __future__ import annotations

import math
import zlib

from bitbook.artifact.artifact import Artifact
from bitbook.artifact.contents import (
    DTYPES,
    NEWEST,
    Dense,
    File,
    Group,
    Room,
    about,
    canonical,
    check_aliases,
    coded_tensors,
    dense_bytes,
    input_parts,
    input_streams,
    is_coded,
    plan_json,
    read_plan,
    streams_of,
)
from bitbook.artifact.span import Span
from bitbook.coding.coder import Coder
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Quantized

FORMAT = 2
DEFAULT_CODER = "Smallest"
"""The coder of a file that names none."""

OPENING = b'{"bitbook":'
"""How the header begins; in format 1, `__metadata__` comes before this name."""

_CRC = 4  # bytes


def fits(artifact: Artifact, coder: Coder) -> bool:
    """Whether the plan is short enough for this format."""
    from bitbook.artifact.text import LONGEST  # compiles, which `import bitbook` must not wait for

    return len(_plan(artifact, coder)) <= LONGEST


def build(artifact: Artifact, coder: Coder) -> bytes:
    """The bytes of a file; raises `PlanError` for what the format does not have."""
    from bitbook.artifact import text

    tensors = sorted(artifact.tensors.items())
    coded = [(name, t) for name, t in tensors if isinstance(t, Quantized) and is_coded(t)]
    streams = [stream for name, tensor in coded for stream in streams_of(name, tensor)] + input_streams(artifact)
    plan = text.encode(_plan(artifact, coder))
    codes = coder.encode(streams) if streams else b""
    dense = b"".join(dense_bytes(tensor) for _, tensor in tensors if not is_coded(tensor))
    behind = _varint(len(plan)) + plan + codes + dense
    header = _header(1 + _CRC + len(behind))
    front = len(header).to_bytes(8, "little") + header + bytes([FORMAT])
    return front + _checksum(front, behind).to_bytes(_CRC, "little") + behind


def parse(header: bytes, data: Span, room: Room) -> File:
    """What the header's text and the data behind it say; raises `CorruptArtifact`."""
    from bitbook.artifact import text

    if header != _header(len(data)):
        raise CorruptArtifact(f"the header does not say that one entry holds the {len(data)} bytes behind it")
    payload = data.read()
    if len(payload) < 1 + _CRC:
        raise CorruptArtifact(f"an entry of {len(payload)} bytes is too short")
    if payload[0] != FORMAT:
        if payload[0] > NEWEST:
            raise CorruptArtifact(f"written by a newer bitbook, in format {payload[0]}; this one reads up to {NEWEST}")
        raise CorruptArtifact(f"unknown format version {payload[0]}; a file of one entry says {FORMAT}")
    front = len(header).to_bytes(8, "little") + header + bytes([FORMAT])
    behind = payload[1 + _CRC :]
    if int.from_bytes(payload[1 : 1 + _CRC], "little") != _checksum(front, behind):
        raise CorruptArtifact("the checksum does not match: the file was altered after it was written")
    with about("plan"):
        size, start = _read_varint(behind)
        if size > len(behind) - start:
            raise CorruptArtifact(f"it claims {size} bytes; {len(behind) - start} are there")
        line = text.decode(behind[start : start + size])
    plan = read_plan(line, DEFAULT_CODER, dense=True)
    check_aliases(plan, {**plan.coded, **plan.dense})
    rest = Span.of(behind[start + size :])
    sizes = {name: DTYPES[dtype].itemsize * math.prod(shape) for name, (shape, dtype) in plan.dense.items()}
    if sum(sizes.values()) > len(rest):
        raise CorruptArtifact(f"the dense tensors take {sum(sizes.values())} bytes, but there are {len(rest)}")
    at = len(rest) - sum(sizes.values())
    group = Group("codes", rest.part(0, at), coded_tensors(plan, room), input_parts(plan, room))
    if len(group.data) and not group.parts:
        raise CorruptArtifact(f"there are {len(group.data)} bytes of codes, and the plan names none")
    entries: list[Dense | Group] = [group] if group.parts else []
    for name, (shape, dtype) in plan.dense.items():
        room.take(shape)
        entries.append(Dense(name, dtype, shape, rest.part(at, at + sizes[name])))
        at += sizes[name]
    parts = {"length": 8, "index": len(header), "format": 1, "crc": _CRC, "plan": start + size}
    return File(parts, plan, entries)


def _plan(artifact: Artifact, coder: Coder) -> bytes:
    return canonical(plan_json(artifact, coder, DEFAULT_CODER, dense=True))


def _header(size: int) -> bytes:
    return canonical({"bitbook": {"data_offsets": [0, size], "dtype": "U8", "shape": [size]}})


def _checksum(front: bytes, behind: bytes | memoryview) -> int:
    """CRC-32 of the whole file with the checksum's own bytes taken as zeros."""
    return zlib.crc32(behind, zlib.crc32(front + bytes(_CRC)))


def _varint(number: int) -> bytes:
    """A whole number in groups of 7 bits, the lowest first; all bytes but the last have the top bit."""
    out = []
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: memoryview) -> tuple[int, int]:
    """The number at the beginning of `data`, and how many bytes it takes."""
    number = 0
    for at, byte in enumerate(data[:4]):
        number |= (byte & 0x7F) << 7 * at
        if byte <= 0x7F:
            if at and not byte:
                raise CorruptArtifact("its length is not written in the shortest form")
            return number, at + 1
    raise CorruptArtifact("its length does not end within 4 bytes")
