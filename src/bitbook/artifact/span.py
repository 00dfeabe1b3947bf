"""Bytes of a file that are read when they are asked for, so that a large file is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitbook.errors import CorruptArtifact

CHUNK = 1 << 20
"""Bytes that are read at once where all that is wanted is to go over them."""


@dataclass(frozen=True)
class Span:
    """The bytes from `start` to `stop` of something in memory, or of a file; another process may read the latter."""

    source: memoryview | Path
    start: int
    stop: int

    @classmethod
    def of(cls, source: bytes | memoryview | Path) -> Span:
        """All bytes of memory, or of a file as long as it is now; raises `FileNotFoundError`."""
        if isinstance(source, Path):
            return cls(source, 0, source.stat().st_size)
        return cls(memoryview(source), 0, len(source))

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Span:
        """Bytes of this span, counted from its own start."""
        assert 0 <= start <= stop <= len(self), f"{start}…{stop} of {len(self)}"
        return Span(self.source, self.start + start, self.start + stop)

    def read(self) -> memoryview:
        """The bytes; raises `CorruptArtifact` where the file has become shorter."""
        if isinstance(self.source, memoryview):
            return self.source[self.start : self.stop]
        room = bytearray(len(self))
        with open(self.source, "rb", buffering=0) as file:
            file.seek(self.start)
            got = 0
            while got < len(room):
                step = file.readinto(memoryview(room)[got:])
                if not step:
                    raise CorruptArtifact(f"{self.source}: the file ends at {self.start + got}, short of {self.stop}")
                got += step
        return memoryview(room)

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes, some at a time."""
        for start in range(0, len(self), size):
            yield self.part(start, min(start + size, len(self))).read()
