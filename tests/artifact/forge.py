"""Files with any content and a right checksum, as an attacker makes them."""

from __future__ import annotations

import json
import zlib
from typing import Any

from bitbook.artifact import text

Json = Any


def text_of(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8", "surrogatepass")


# -- format 1 ----------------------------------------------------------------------------------


def signed(text: bytes, payload: bytes) -> bytes:
    """A file of this header text, with its checksum put right."""
    text = text.ljust(-(-len(text) // 8) * 8)
    zeroed = text
    start = text.find(b'"crc32":"') + 9
    if start > 8:
        zeroed = text[:start] + b"0" * 8 + text[start + 8 :]
        crc = zlib.crc32(len(text).to_bytes(8, "little") + zeroed + payload)
        text = text[:start] + f"{crc:08x}".encode() + text[start + 8 :]
    return len(text).to_bytes(8, "little") + text + payload


def opened(data: bytes) -> tuple[Json, Json, bytes]:
    """Header, plan, payload."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header, json.loads(header["__metadata__"]["plan"]), data[end:]


def closed(header: Json, plan: Json, payload: bytes) -> bytes:
    header["__metadata__"]["plan"] = text_of(plan).decode("utf-8", "surrogatepass")
    return signed(text_of(header), payload)


# -- format 2 ----------------------------------------------------------------------------------


def signed_one(behind: bytes, number: int = 2) -> bytes:
    """A file of one entry that holds this behind its checksum."""
    size = 5 + len(behind)
    header = b'{"bitbook":{"data_offsets":[0,%d],"dtype":"U8","shape":[%d]}}' % (size, size)
    front = len(header).to_bytes(8, "little") + header + bytes([number])
    return front + zlib.crc32(front + bytes(4) + behind).to_bytes(4, "little") + behind


def opened_one(data: bytes) -> tuple[bytes, bytes]:
    """The plan's text, and the codes and dense tensors behind it."""
    start = 8 + int.from_bytes(data[:8], "little") + 5
    size, start = data[start], start + 1
    if size > 0x7F:
        size, start = size & 0x7F | data[start] << 7, start + 1
    return text.decode(data[start : start + size]), data[start + size :]


def closed_one(plan: bytes, rest: bytes) -> bytes:
    coded = text.encode(plan)
    size = [len(coded)] if len(coded) < 0x80 else [len(coded) & 0x7F | 0x80, len(coded) >> 7]
    return signed_one(bytes(size) + coded + rest)
