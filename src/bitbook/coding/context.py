"""Adaptive arithmetic coding of a group of streams: one range coder, a model for each kind of stream.

    choice of coder ─► per stream: how it is written ─► its symbols ─► … ─► shortest end

Streams without a bound, with a centre or of two symbols are numbers: zero flag, sign and magnitude on their grid.
Others are labels, of which nothing but their bits is known.  Either may be written plainly where learning does not pay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from bitbook.coding.fixed import checked
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import LARGEST_CODE, Stream, StreamSpec, code_dtype
from bitbook.trellis.machine import NO_MACHINE, next_states

if TYPE_CHECKING:
    from bitbook.coding import small

Profile = Literal["small", "fast"]
CHOICES = ("small", "fast", "Rans", "Fixed")
"""What the first two bits of a group's bytes say, here and in `Smallest`."""

LONGEST_STRIDE = 255
_TRIED_STRIDES = 3
_TRIED_SYMBOLS = 1 << 17  # that are coded to compare strides
_UNLIKELY = 1 << 12  # of a flag, in 1/65536
_NOTHING_ODD = np.zeros((0, 0), np.int32)


@dataclass(frozen=True)
class Context:
    """Adaptive coding; "small" mixes many models (≥ 1 M symbols/s), "fast" asks one context (≥ 8 M symbols/s).

    The profile is in the bytes: either object decodes what either has encoded.

    What an encoder may choose (the profile, plain or modelled, the stride) any reader accepts; given those choices,
    exactly one sequence of bytes decodes to given codes, and everything else is refused.
    """

    profile: Profile = "small"

    def __post_init__(self) -> None:
        if self.profile not in ("small", "fast"):
            raise PlanError(f"Context(profile={self.profile!r}): use 'small' or 'fast'")

    def encode(self, streams: Sequence[Stream]) -> bytes:
        return self.measured(streams)[0]

    def measured(self, streams: Sequence[Stream]) -> tuple[bytes, list[float]]:
        """The bytes of all streams, and how many bits each of them took."""
        if not streams:
            return b"", []
        grids = [_grid(stream) for stream in streams]
        room = 1024 + sum(grid.size * 3 for grid in grids)
        while True:
            group = _Group(None, room, CHOICES.index(self.profile))
            bits = [group.bits]
            for stream, grid in zip(streams, grids, strict=True):
                group.code(stream.spec, grid.copy())
                bits.append(group.bits)
            data = group.finish()
            if data is not None:
                return data, [end - start for start, end in itertools.pairwise(bits)]
            room = group.position + 16

    def decode(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[Tensor]:
        return [codes for codes, _ in _decoded(data, specs)]

    def sizes(self, data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[int]:
        """Bytes that are certain when a stream is finished, less those before it; found by decoding."""
        ends = [min(end, len(data)) for _, end in _decoded(data, specs)]
        if ends:
            ends[-1] = len(data)
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _decoded(data: bytes | memoryview, specs: Sequence[StreamSpec]) -> list[tuple[Tensor, int]]:
    if not specs:
        if len(data):
            raise CorruptArtifact(f"there are no streams, but {len(data)} bytes")
        return []
    group = _Group(bytes(data), 0, 0)
    decoded = []
    for spec in specs:
        grid = np.zeros(spec.grid, np.int32 if _is_number(spec) else np.int64)
        group.code(spec, grid)
        codes = grid + spec.centre if _is_number(spec) and spec.alphabet is not None else grid
        if spec.alphabet is not None and codes.size and int(codes.max()) >= spec.alphabet:
            raise CorruptArtifact(f"{spec.name}: code {int(codes.max())} is not in [0, {spec.alphabet})")
        decoded.append((torch.from_numpy(codes).to(code_dtype(spec.alphabet)), group.position))
    group.check_end()
    return decoded


def _is_number(spec: StreamSpec) -> bool:
    return spec.alphabet is None or spec.centre > 0 or spec.alphabet == 2


def _grid(stream: Stream) -> np.ndarray:
    """The codes on their grid, numbers around zero; raises `PlanError` where they are not what the spec says."""
    spec = stream.spec
    values = checked(stream).reshape(spec.grid).astype(np.int64)
    if not _is_number(spec):
        return values
    return (values if spec.alphabet is None else values - spec.centre).astype(np.int32)


def _limits(spec: StreamSpec) -> tuple[int, int]:
    return (-LARGEST_CODE, LARGEST_CODE) if spec.alphabet is None else (-spec.centre, spec.alphabet - 1 - spec.centre)


class _Group:
    """One pass over a group's streams, writing where `data` is None and reading otherwise."""

    def __init__(self, data: bytes | None, room: int, choice: int) -> None:
        from bitbook.coding import range_coder, small  # numba takes its time to import

        self._range_coder = range_coder
        if data is None:
            self.buffer = np.zeros(room, np.uint8)
            self.coder = range_coder.encoder()
        else:
            self.buffer = np.frombuffer(bytearray(data), np.uint8)
            self.coder = range_coder.decoder(self.buffer)
        self.choice = int(range_coder.code_uniform(self.coder, self.buffer, choice, len(CHOICES)))
        if CHOICES[self.choice] not in ("small", "fast"):
            raise CorruptArtifact(f"the codes are written by {CHOICES[self.choice]}, which is another coder")
        self.reading = data is not None
        self.learnt: small.Learnt = small.Learnt.fresh()
        self.links: dict[int, np.ndarray] = {}  # length of an axis -> classes of its members

    @property
    def position(self) -> int:
        return max(int(self.coder[self._range_coder.POSITION]) - (6 if self.reading else 0), 0)

    @property
    def bits(self) -> float:
        """What has been written so far."""
        return self._range_coder.bits(self.coder)

    def finish(self) -> bytes | None:
        return self._range_coder.finish(self.coder, self.buffer)

    def check_end(self) -> None:
        if not self._range_coder.finished(self.coder, self.buffer):
            raise CorruptArtifact(f"the {len(self.buffer)} bytes of the codes do not end where the codes do")

    def code(self, spec: StreamSpec, grid: np.ndarray) -> None:
        """Code one stream; `grid` (rows, cols) is filled when reading."""
        if grid.size == 0 or spec.alphabet == 1:
            return
        if _is_number(spec):
            self._code_numbers(spec, grid)
        else:
            self._code_labels(spec, grid)

    def _flag(self, flag: bool) -> bool:
        return bool(self._range_coder.code_bit(self.coder, self.buffer, int(flag), _UNLIKELY))

    def _code_labels(self, spec: StreamSpec, grid: np.ndarray) -> None:
        from bitbook.coding import labels

        assert spec.alphabet is not None
        width = (spec.alphabet - 1).bit_length()
        contexts = int(CHOICES[self.choice] == "small")
        likely = grid.size >= 64 and spec.alphabet <= 1 << 12  # where modelling pays as a rule
        modelled = likely
        if not self.reading:  # an encoder's choice only: floats here do not reach the decoder
            plain = grid.size * np.log2(spec.alphabet)
            learnt = labels.Learnt.fresh(width)
            modelled = self._bits(labels.code_grid, grid, width, contexts, learnt) < plain
        if self._flag(modelled != likely) != likely:
            labels.code_grid(self.coder, self.buffer, grid, width, contexts, labels.Learnt.fresh(width))
        else:
            labels.code_plain(self.coder, self.buffer, grid.reshape(-1), spec.alphabet)

    def _code_numbers(self, spec: StreamSpec, grid: np.ndarray) -> None:
        from bitbook.coding import fast, labels, small

        low, high = _limits(spec)
        machine, odd = NO_MACHINE, _NOTHING_ODD
        levels = grid
        if spec.states:
            machine, low, high = next_states(spec.states), low // 2 + 1, high // 2
            odd = np.where(levels & 1, np.sign(levels), 0).astype(np.int32)
            grid = (np.sign(levels) * (np.abs(levels) >> 1)).astype(np.int32)
        if spec.alphabet is not None and spec.alphabet <= 1 << 16:
            plain = False
            if not self.reading:
                size = self._bits(fast.code_grid, grid, low, high, machine, odd, *fast.fresh())
                plain = size > grid.size * np.log2(spec.alphabet)
            if self._flag(plain):
                codes = grid.astype(np.int64).reshape(-1) + spec.centre
                labels.code_plain(self.coder, self.buffer, codes, spec.alphabet)
                grid[:] = codes.reshape(grid.shape) - spec.centre
                return
        if CHOICES[self.choice] == "fast":
            outside = fast.code_grid(self.coder, self.buffer, grid, low, high, machine, odd, *fast.fresh())
        else:
            links = [self.links.get(n, np.full(n, -1, np.int64)) for n in grid.shape]
            stride = 0 if self.reading else self._stride(grid, low, high, machine, odd, links)
            stride = self._code_stride(stride, grid.shape[1])
            outside = small.code_grid(
                self.coder, self.buffer, grid, stride, low, high, machine, odd, links[0], links[1], self.learnt
            )
            for n, axis in ((grid.shape[0], 1), (grid.shape[1], 0)):
                found = np.count_nonzero(grid, axis=axis)
                self.links[n] = np.searchsorted([1, 2, 4, 8, 16, 32], found, side="right").astype(np.int64)
        if outside:
            raise CorruptArtifact(f"{spec.name}: {outside} codes are not in [{low}, {high}]")
        if spec.states and self.reading:
            levels[:] = 2 * grid + odd

    def _code_stride(self, stride: int, cols: int) -> int:
        """Code the stride, which is below the number of columns."""
        if cols < 3:
            return 0
        most = min(cols - 1, LONGEST_STRIDE)
        if not self._range_coder.code_uniform(self.coder, self.buffer, int(stride > 0), 2):
            return 0
        return 1 + int(self._range_coder.code_uniform(self.coder, self.buffer, stride - 1, most))

    def _stride(
        self, grid: np.ndarray, low: int, high: int, machine: np.ndarray, odd: np.ndarray, links: Sequence[np.ndarray]
    ) -> int:
        """The stride that makes the first rows smallest, of the few at which non-zeros most often come in pairs."""
        from bitbook.coding import small

        cols = grid.shape[1]
        head = grid[: max(_TRIED_SYMBOLS // cols, 1)]
        odd = odd[: len(head)]
        nonzero = (head != 0).astype(np.float32)
        if cols < 3 or not nonzero.any():
            return 0
        nonzero -= nonzero.mean(1, keepdims=True)
        most = min(cols - 1, LONGEST_STRIDE)
        alike = np.array([(nonzero[:, :-s] * nonzero[:, s:]).sum() / (cols - s) ** 0.5 for s in range(1, most + 1)])
        tried = {0, 1, *(int(s) + 1 for s in np.argsort(-alike[1:], kind="stable")[:_TRIED_STRIDES] + 1)}
        links = [links[0][: len(head)], links[1]]

        def bits(stride: int) -> float:
            rest = (stride, low, high, machine, odd, *links, small.Learnt.fresh())
            return self._bits(small.code_grid, head, *rest) + 8 * (stride > 0)

        return min(sorted(tried), key=bits)

    def _bits(self, code_grid: Callable[..., object], grid: np.ndarray, *rest: object) -> float:
        """What a model would need for a grid on its own."""
        coder, nowhere = self._range_coder.encoder(), np.zeros(1, np.uint8)
        code_grid(coder, nowhere, grid.copy(), *rest)
        return self._range_coder.bits(coder)
