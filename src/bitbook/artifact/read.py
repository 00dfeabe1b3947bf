"""Bytes to content.  A file may come from a stranger: the answer is content, or `CorruptArtifact`.

    bytes ─► header ─► plan, entries ─► groups of streams ─► codes ─► Artifact
             each claim is checked against the file's length before anything of its size is allocated

The rules and their reasons are in FORMAT.md, beside this file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bitbook.artifact import one, per_tensor
from bitbook.artifact.artifact import Artifact, QuantizedInput, input_children
from bitbook.artifact.contents import DTYPES, Coded, Dense, File, Group, Room, about
from bitbook.artifact.ledger import HEADER, Ledger, Row
from bitbook.artifact.span import Span
from bitbook.coding.coder import Coder
from bitbook.errors import CorruptArtifact
from bitbook.quantizer import Quantized, assemble

_T = TypeVar("_T")
_MOST_HEADER = 100_000_000  # bytes; the limit of safetensors
_FREE_ELEMENTS = 1 << 24  # what any file may claim, however small
_ELEMENTS_PER_BYTE = 4096  # what a larger file may claim for each of its bytes


def read(path: str | os.PathLike[str], *, max_elements: int | None = None) -> Artifact:
    """Read a file; nothing in it is executed, and tensors are decoded only when asked for.

    Args:
        path: the file.
        max_elements: how many elements (weights, side tensors and codes together) the file may claim.  A
            codebook of one word costs no bytes per weight, so that a tiny file could claim any number.
            None allows 2^24, or 4096 per byte of the file if that is more.

    Raises:
        CorruptArtifact: the file is not what it claims to be; the message says why.
        FileNotFoundError: there is none.
    """
    with about(path):
        return from_bytes(Path(path).read_bytes(), max_elements=max_elements)


def from_bytes(data: bytes | memoryview, *, max_elements: int | None = None) -> Artifact:
    """`read`, of a file that is in memory."""
    contents = _each(data, max_elements, lambda tensor: tensor, 1)
    return Artifact(contents.tensors, contents.inputs, contents.aliases)


class Contents(NamedTuple, Generic[_T]):
    """What `Artifact` holds, with quantized tensors as the caller holds them."""

    tensors: Mapping[str, _T | Tensor]
    inputs: Mapping[str, QuantizedInput]
    aliases: Mapping[str, str]


def read_each(
    path: str | os.PathLike[str], hold: Callable[[Quantized], _T], threads: int, *, max_elements: int | None = None
) -> Contents[_T]:
    """`read`, which hands each quantized tensor to `hold` and keeps what that returns instead.

    Of a file with an entry per tensor, only `threads` tensors are unpacked at a time.
    """
    with about(path):
        return _each(Path(path).read_bytes(), max_elements, hold, threads)


def _each(
    data: bytes | memoryview, max_elements: int | None, hold: Callable[[Quantized], _T], threads: int
) -> Contents[_T]:
    file = parse(Span.of(data), max_elements)
    tensors: dict[str, _T | Tensor] = {}
    inputs = {module: QuantizedInput(a) for module, a in file.plan.activations.items() if not input_children(a)}

    def decoded(entry: Dense | Group) -> tuple[dict[str, _T | Tensor], dict[str, QuantizedInput]]:
        if isinstance(entry, Dense):
            return {entry.name: _dense(entry)}, {}
        codes = _codes(entry, file.plan.coder)
        own: dict[str, _T | Tensor] = {tensor.name: hold(_coded(tensor, codes)) for tensor in entry.tensors}
        return own, _inputs(file, codes) if entry.inputs else {}

    with ThreadPoolExecutor(threads) as pool:
        for own, of_inputs in map(decoded, file.entries) if threads == 1 else pool.map(decoded, file.entries):
            tensors |= own
            inputs |= of_inputs
    return Contents(dict(sorted(tensors.items())), dict(sorted(inputs.items())), file.plan.aliases)


def read_ledger(path: str | os.PathLike[str], *, max_elements: int | None = None) -> Ledger:
    """What each byte of a file is for; arguments and errors as for `read`.

    Of a file with an entry per tensor, no more than one of them is in memory at a time.
    """
    with about(path):
        return _ledger(Span.of(Path(path)), max_elements)


def ledger_from_bytes(data: bytes | memoryview, *, max_elements: int | None = None) -> Ledger:
    """`read_ledger`, of a file that is in memory."""
    return _ledger(Span.of(data), max_elements)


def _ledger(data: Span, max_elements: int | None) -> Ledger:
    file = parse(data, max_elements)
    rows = [Row(HEADER, part, "", (), size, 0) for part, size in file.header.items()]
    for entry in file.entries:
        rows += _dense_rows(entry) if isinstance(entry, Dense) else _coded_rows(entry, file.plan.coder)
    ledger = Ledger(tuple(rows))
    assert ledger.total == len(data), f"the ledger counts {ledger.total} bytes of {len(data)}"
    return ledger


def parse(data: Span, max_elements: int | None) -> File:
    """What a file says that it holds, checked against its length; errors as for `read`."""
    room = Room(max(_FREE_ELEMENTS, _ELEMENTS_PER_BYTE * len(data)) if max_elements is None else max_elements)
    text, payload = split_header(data)
    layout = one if text.startswith(one.OPENING) else per_tensor
    return layout.parse(text, payload, room)


def split_header(data: Span) -> tuple[bytes, Span]:
    """The text of a safetensors header, and the data behind it; raises `CorruptArtifact` for a length that lies."""
    if len(data) < 8:
        raise CorruptArtifact(f"a file of {len(data)} bytes is too short: the header's length alone takes 8")
    size = int.from_bytes(data.part(0, 8).read(), "little")
    if size > min(len(data) - 8, _MOST_HEADER):
        raise CorruptArtifact(
            f"the header claims {size} bytes; {len(data) - 8} are there, and {_MOST_HEADER} are allowed"
        )
    return bytes(data.part(8, 8 + size).read()), data.part(8 + size, len(data))


def read_coded(group: Group, coder: Coder) -> Quantized:
    """The one tensor of a group that holds no more; raises `CorruptArtifact`."""
    (tensor,) = group.tensors
    return _coded(tensor, _codes(group, coder))


def _coded(tensor: Coded, codes: Iterator[Tensor]) -> Quantized:
    quantized = assemble(tensor.recipe, tensor.shape, codes)
    _check_finite(quantized.side, tensor.name)
    return quantized


def _codes(group: Group, coder: Coder) -> Iterator[Tensor]:
    with about(group.name):
        return iter(coder.decode(group.data.read(), [part.spec for part in group.parts]))


def _inputs(file: File, codes: Iterator[Tensor]) -> dict[str, QuantizedInput]:
    """The inputs that have side tensors."""
    inputs: dict[str, QuantizedInput] = {}
    for module, activation in file.plan.activations.items():
        if children := input_children(activation):
            side = {name: assemble(child.recipe, child.shape, codes) for name, child in children.items()}
            _check_finite(side, module)
            inputs[module] = QuantizedInput(activation, side)
    return inputs


def _dense(entry: Dense) -> Tensor:
    raw = torch.empty(len(entry.data), dtype=torch.uint8)
    raw.numpy()[:] = np.asarray(entry.data.read())
    if entry.dtype == "BOOL" and (raw > 1).any():
        raise CorruptArtifact(f"{entry.name}: a boolean is neither 0 nor 1")
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _dense_rows(entry: Dense) -> list[Row]:
    dtype = str(DTYPES[entry.dtype]).removeprefix("torch.")
    return [Row(entry.name, "values", dtype, entry.shape, len(entry.data), math.prod(entry.shape))]


def _coded_rows(group: Group, coder: Coder) -> list[Row]:
    """One row per stream; a tensor's elements are counted on its last."""
    with about(group.name):
        sizes = iter(coder.sizes(group.data.read(), [part.spec for part in group.parts]))
    rows: list[Row] = []
    for tensor in group.tensors:
        rows += [Row(p.owner, p.spec.name, repr(p.recipe), p.shape, next(sizes), 0) for p in tensor.parts]
        rows[-1] = rows[-1]._replace(weights=math.prod(tensor.shape))
    rows += [Row(p.owner, p.spec.name, repr(p.recipe), p.shape, next(sizes), 0) for p in group.inputs]
    return rows


def _check_finite(side: Mapping[str, Quantized], owner: str) -> None:
    """A scale or codeword that is not finite was never written, and would spoil a whole tensor in silence."""
    for name, quantized in side.items():
        _check_finite(quantized.side, owner)
        if not quantized.decode().isfinite().all():
            raise CorruptArtifact(f"{owner}: its {name} holds values that are not finite")
