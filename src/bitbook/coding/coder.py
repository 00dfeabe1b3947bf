"""What a coder is: code streams to bytes and back, without loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from bitbook.quantizer import Stream, StreamSpec


class Coder(Protocol):
    """Lossless coding of a group of streams; one call is one unit of random access.

    A specification (grid and alphabet) is known on both sides and is never part of the bytes.
    """

    def encode(self, streams: Sequence[Stream]) -> bytes:
        """The bytes of all streams; raises `PlanError` for codes that are not what their spec says."""
        ...

    def decode(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[Tensor]:
        """The codes again, each of its spec's grid and of `code_dtype`; raises `CorruptArtifact`.

        Given what the encoder was free to choose (see FORMAT.md), exactly one sequence of bytes decodes to given codes;
        everything else is refused.
        """
        ...

    def sizes(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[int]:
        """How many of the bytes belong to each stream, adding up to all of them.

        Raises `CorruptArtifact` where `data` cannot hold these streams.  An adaptive coder decodes to find out.
        """
        ...
