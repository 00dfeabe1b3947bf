"""Bytes to content.  A file may come from a stranger: the answer is content, or `CorruptArtifact`.

    bytes ─► header ─► plan, entries ─► exact sizes ─► codes ─► Artifact
             each claim is checked against the file's length before anything of its size is allocated

The rules and their reasons are in FORMAT.md, beside this file.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bitbook.artifact.artifact import INPUTS, METADATA, Artifact, QuantizedInput, input_children
from bitbook.artifact.ledger import HEADER, Ledger, Row
from bitbook.blocks import Grid, Shape
from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.plan import Activation, recipe_from_json, recipe_to_json
from bitbook.quantizer import Quantized, Quantizer, StreamSpec, assemble
from bitbook.scalar.leaves import Float

VERSION = 1
"""The format that is written, and the newest that is read."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dense types, by the names that safetensors gives them."""

CODERS: Mapping[str, Coder] = {"Fixed": Fixed()}
"""Every coder that a file can name."""

DEFAULT_CODER = "Fixed"
"""The coder of a file that names none."""

_MOST_HEADER = 100_000_000  # bytes; the limit of safetensors
_MOST_AXES = 64  # the limit of numpy
_FREE_ELEMENTS = 1 << 24  # what any file may claim, however small
_ELEMENTS_PER_BYTE = 4096  # what a larger file may claim for each of its bytes

_T = TypeVar("_T")


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
    with _about(path):
        return from_bytes(Path(path).read_bytes(), max_elements=max_elements)


def from_bytes(data: bytes | memoryview, *, max_elements: int | None = None) -> Artifact:
    """`read`, of a file that is in memory."""
    file = _parse(memoryview(data), max_elements)
    tensors = {e.name: _tensor(e, file.plan.coder) for e in file.entries if e.name != INPUTS}
    codes = (c for e in file.entries if e.name == INPUTS for c in _codes(e, file.plan.coder))
    inputs: dict[str, QuantizedInput] = {}
    for module, activation in file.plan.activations.items():
        children = input_children(activation)
        side = {name: assemble(child.recipe, child.shape, codes) for name, child in children.items()}
        _check_finite(side, module)
        inputs[module] = QuantizedInput(activation, side)
    return Artifact(dict(sorted(tensors.items())), inputs, file.plan.aliases)


def read_ledger(path: str | os.PathLike[str], *, max_elements: int | None = None) -> Ledger:
    """What each byte of a file is for, without decoding any code; arguments and errors as for `read`."""
    with _about(path):
        return ledger_from_bytes(Path(path).read_bytes(), max_elements=max_elements)


def ledger_from_bytes(data: bytes | memoryview, *, max_elements: int | None = None) -> Ledger:
    """`read_ledger`, of a file that is in memory."""
    file = _parse(memoryview(data), max_elements)
    rows = [Row(HEADER, part, "", (), size, 0) for part, size in file.header.items()]
    for entry in file.entries:
        parts = [Row(p.owner, p.spec.name, repr(p.recipe), p.shape, size, 0) for p, size in entry.sizes]
        if entry.dense:
            dtype = str(DTYPES[entry.dtype]).removeprefix("torch.")
            parts = [Row(entry.name, "values", dtype, entry.shape, len(entry.data), 0)]
        if entry.name != INPUTS:
            parts[-1] = parts[-1]._replace(weights=math.prod(entry.shape))
        rows += parts
    ledger = Ledger(tuple(rows))
    assert ledger.total == len(data), f"the ledger counts {ledger.total} bytes of {len(data)}"
    return ledger


# -- what a checked file consists of -----------------------------------------------------------


class _Part(NamedTuple):
    """One code stream: whose it is, and the recipe and shape of what it belongs to."""

    owner: str
    spec: StreamSpec
    recipe: Quantizer
    shape: Shape


class _Entry(NamedTuple):
    """One entry of the index, with what the plan says about it."""

    name: str
    dtype: str
    shape: Shape  # of the decoded tensor
    data: memoryview
    recipe: Quantizer | None = None
    sizes: Sequence[tuple[_Part, int]] = ()  # bytes of each stream

    @property
    def dense(self) -> bool:
        return self.recipe is None and self.name != INPUTS


class _Plan(NamedTuple):
    """The plan in the header, read but not yet compared with the index."""

    tensors: Mapping[str, tuple[Shape, Quantizer]]
    activations: Mapping[str, Activation]
    aliases: Mapping[str, str]
    coder: Coder


@dataclass(frozen=True)
class _File:
    """A file whose every claim has been checked against its length; no code is decoded yet."""

    header: Mapping[str, int]  # bytes of each of its parts
    plan: _Plan
    entries: Sequence[_Entry]  # in file order


def _parse(data: memoryview, max_elements: int | None) -> _File:
    text, payload = _split(data)
    body = text.rstrip(b" ")
    index = _object(_json(body, "the header"), "the header")
    metadata = _metadata(index.get(METADATA))
    _check_canonical(body, index, "the header")
    if len(text) != len(body) + padding(len(body)):
        raise CorruptArtifact("the header is not padded with spaces to the next multiple of 8 bytes")
    del index[METADATA]
    if metadata["crc32"] != checksum(index, metadata, payload):
        raise CorruptArtifact("the checksum does not match: the file was altered after it was written")
    with _about("plan"):
        plan = _read_plan(metadata["plan"].encode())
    room = _Room(max(_FREE_ELEMENTS, _ELEMENTS_PER_BYTE * len(data)) if max_elements is None else max_elements)
    entries = list(_entries(index, plan, payload, room))
    for alias, name in plan.aliases.items():
        if alias in index or name not in index or INPUTS in (alias, name):
            raise CorruptArtifact(f"the alias {alias!r} of {name!r} is not a new name for a stored tensor")
    own = len(canonical(index))
    parts = {"length": 8, "index": own, "plan": len(body) - own, "padding": len(text) - len(body)}
    return _File(parts, plan, entries)


# -- header ------------------------------------------------------------------------------------


def _split(data: memoryview) -> tuple[bytes, memoryview]:
    """The header's text and the data behind it."""
    if len(data) < 8:
        raise CorruptArtifact(f"a file of {len(data)} bytes is too short: the header's length alone takes 8")
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, _MOST_HEADER):
        raise CorruptArtifact(
            f"the header claims {size} bytes; {len(data) - 8} are there, and {_MOST_HEADER} are allowed"
        )
    return bytes(data[8 : 8 + size]), data[8 + size :]


def _json(text: bytes, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise CorruptArtifact(f"{what} has a key twice")
        return value

    def whole(digits: str) -> int:
        if len(digits) > 18:  # so that no product or message has to cope with numbers of any size
            raise CorruptArtifact(f"{what} has a number of {len(digits)} digits; 18 are allowed")
        return int(digits)

    try:
        return json.loads(text.decode(), object_pairs_hook=unique, parse_int=whole)
    except CorruptArtifact:
        raise
    except RecursionError:
        raise CorruptArtifact(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise CorruptArtifact(f"{what} is not JSON in UTF-8: {error}") from None


def _check_canonical(text: bytes, value: Any, what: str) -> None:
    try:
        same = canonical(value) == text
    except (ValueError, RecursionError):  # half a surrogate pair, infinity; nested almost too deeply
        same = False
    if not same:
        raise CorruptArtifact(f"{what} is not canonical JSON: keys sorted, no spaces, no needless escapes")


def _metadata(value: Any) -> dict[str, str]:
    metadata = {} if value is None else _object(value, METADATA)
    version = metadata.get("bitbook")
    if version is None:
        raise CorruptArtifact("this is no bitbook file: its header does not say 'bitbook'")
    if version != str(VERSION):
        shown = str(version)[:20]
        if isinstance(version, str) and re.fullmatch("[1-9][0-9]{0,5}", version) and int(version) > VERSION:
            raise CorruptArtifact(f"written by a newer bitbook, in format {shown}; this one reads {VERSION}")
        raise CorruptArtifact(f"unknown format version {shown!r}; this bitbook reads {VERSION}")
    if metadata.keys() != {"bitbook", "crc32", "plan"} or any(type(v) is not str for v in metadata.values()):
        raise CorruptArtifact(f"{METADATA} does not hold the texts 'bitbook', 'crc32', 'plan' and no others")
    return metadata


def _read_plan(text: bytes) -> _Plan:
    """The plan; its recipes are checked by themselves, not yet against any tensor."""
    plan = _object(_json(text, "it"), "it")
    _check_canonical(text, plan, "it")
    unknown = plan.keys() - {"activations", "aliases", "coder", "inputs", "recipes", "tensors"}
    if unknown or not all(plan.values()):
        raise CorruptArtifact(f"it has unknown or empty keys; found {', '.join(plan)}")
    coder = plan.get("coder", DEFAULT_CODER)
    if not isinstance(coder, str) or coder not in CODERS or plan.get("coder") == DEFAULT_CODER:
        raise CorruptArtifact(f"the coder {coder!r} is unknown, or the default one, which is never named")
    tensors = _object(plan.get("tensors", {}), "tensors")
    if not all(isinstance(claim, list) and len(claim) == 2 for claim in tensors.values()):
        raise CorruptArtifact("a tensor is not [shape, recipe number]")
    recipe_numbers = {name: claim[1] for name, claim in tensors.items()}
    recipes = _look_up(plan.get("recipes", []), recipe_from_json, recipe_to_json, recipe_numbers)
    inputs = _object(plan.get("inputs", {}), "inputs")
    aliases = _object(plan.get("aliases", {}), "aliases")
    if not all(isinstance(name, str) for name in aliases.values()):
        raise CorruptArtifact("an alias is not a name")
    return _Plan(
        {name: (_shape(claim[0]), recipes[name]) for name, claim in tensors.items()},
        _look_up(plan.get("activations", []), Activation.from_json, Activation.to_json, inputs),
        aliases,
        CODERS[coder],
    )


def _look_up(
    table: Any, parse: Callable[[Any], _T], to_json: Callable[[_T], Any], numbers: Mapping[str, Any]
) -> dict[str, _T]:
    """What each name's number stands for in a table of recipes or activations."""
    if not isinstance(table, list) or any(type(number) is not int for number in numbers.values()):
        raise CorruptArtifact("recipes and activations are not lists that names refer to by number")
    text = canonical(table)
    parsed = [parse(value) for value in table]
    if canonical([to_json(value) for value in parsed]) != text:
        raise CorruptArtifact("a recipe or activation is not in its shortest form")
    if list(dict.fromkeys(numbers.values())) != list(range(len(table))) or len(set(parsed)) != len(parsed):
        raise CorruptArtifact("recipes and activations are not listed once each, in the order of first use")
    return {name: parsed[number] for name, number in numbers.items()}


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{what} is not a JSON object")
    return value


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or len(value) > _MOST_AXES or any(type(n) is not int or n < 0 for n in value):
        raise CorruptArtifact(f"{str(value)[:80]} is not a shape: at most {_MOST_AXES} whole numbers in a list")
    return tuple(value)


# -- entries -----------------------------------------------------------------------------------


class _Room:
    """How many elements the file may still claim."""

    def __init__(self, limit: int):
        self.limit = self.left = limit

    def take(self, shape: Sequence[int]) -> None:
        """Count a tensor of `shape`; an empty one counts its other axes, which work may loop over."""
        self.left -= math.prod(max(n, 1) for n in shape)
        if self.left < 0:
            raise CorruptArtifact(
                f"the file claims more than {self.limit} elements; if you trust it, raise max_elements"
            )


def _entries(index: Mapping[str, Any], plan: _Plan, payload: memoryview, room: _Room) -> Iterator[_Entry]:
    """All entries in file order, which leaves exactly one place for each."""
    parts = {name: list(_parts(name, recipe, shape, room)) for name, (shape, recipe) in plan.tensors.items()}
    inputs = [
        part
        for module, activation in plan.activations.items()
        for name, child in input_children(activation).items()
        for part in _parts(module, child.recipe, child.shape, room, f"input.{name}.")
    ]
    if INPUTS in plan.tensors or (INPUTS in index and not inputs):
        raise CorruptArtifact(f"{INPUTS} can only hold the side tensors of inputs, and the plan names none")
    if inputs:
        parts[INPUTS] = inputs
    if missing := sorted(parts.keys() - index.keys()):
        raise CorruptArtifact(f"{missing[0]} is in the plan, but not in the index")
    claims: dict[str, tuple[str, Shape, Any]] = {}
    for name, claim in index.items():
        with _about(name):
            if not isinstance(claim, dict) or claim.keys() != {"data_offsets", "dtype", "shape"}:
                raise CorruptArtifact("its entry does not have 'data_offsets', 'dtype', 'shape' and no others")
            if not isinstance(claim["dtype"], str) or claim["dtype"] not in DTYPES:
                raise CorruptArtifact(f"its type {str(claim['dtype'])[:80]!r} is none of {', '.join(DTYPES)}")
            claims[name] = claim["dtype"], _shape(claim["shape"]), claim["data_offsets"]
    start = 0
    for name in file_order({name: dtype for name, (dtype, _, _) in claims.items()}, parts):
        with _about(name):
            dtype, shape, offsets = claims[name]
            stop = start + DTYPES[dtype].itemsize * math.prod(shape)
            if offsets != [start, stop] or any(type(n) is not int for n in offsets) or stop > len(payload):
                raise CorruptArtifact(
                    f"its data is said to be at {str(offsets)[:80]}, but without holes and overlaps it is at "
                    f"[{start}, {stop}], and {len(payload)} bytes are there"
                )
            data, start = payload[start:stop], stop
            if name not in parts:
                room.take(shape)
                yield _Entry(name, dtype, shape, data)
                continue
            if dtype != "U8" or len(shape) != 1:
                raise CorruptArtifact("its codes are not one row of type U8")
            sizes = plan.coder.sizes(data, [part.spec for part in parts[name]])
            decoded, recipe = plan.tensors.get(name, (shape, None))
            yield _Entry(name, dtype, decoded, data, recipe, list(zip(parts[name], sizes, strict=True)))
    if start != len(payload):
        raise CorruptArtifact(f"the entries end at {start}, but there are {len(payload)} bytes of data")


def _parts(owner: str, recipe: Quantizer, shape: Shape, room: _Room, prefix: str = "") -> Iterator[_Part]:
    """The code streams of a tensor, as in `stream_specs`; counts what decoding them will allocate."""
    with _about(owner):
        if isinstance(recipe, Float) and not prefix:
            raise CorruptArtifact("a float tensor is stored as such, never as codes")
        room.take(shape)
        block = getattr(recipe, "block", None)
        if block is not None:
            grid = Grid.of(shape, block, pad=getattr(recipe, "pad", False))
            room.take((grid.R, grid.r, grid.C, grid.c))
        children = recipe.children(shape)
    for name, child in children.items():
        yield from _parts(owner, child.recipe, child.shape, room, f"{prefix}{name}.")
    with _about(owner):
        for spec in recipe.layout(shape):
            room.take(spec.grid)
            yield _Part(owner, spec._replace(name=prefix + spec.name), recipe, shape)


def _codes(entry: _Entry, coder: Coder) -> list[Tensor]:
    with _about(entry.name):
        return coder.decode(entry.data, [part.spec for part, _ in entry.sizes])


def _tensor(entry: _Entry, coder: Coder) -> Quantized | Tensor:
    if entry.recipe is not None:
        quantized = assemble(entry.recipe, entry.shape, iter(_codes(entry, coder)))
        _check_finite(quantized.side, entry.name)
        return quantized
    raw = torch.empty(len(entry.data), dtype=torch.uint8)
    raw.numpy()[:] = np.asarray(entry.data)
    if entry.dtype == "BOOL" and (raw > 1).any():
        raise CorruptArtifact(f"{entry.name}: a boolean is neither 0 nor 1")
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _check_finite(side: Mapping[str, Quantized], owner: str) -> None:
    """A scale or codeword that is not finite was never written, and would spoil a whole tensor in silence."""
    for name, quantized in side.items():
        _check_finite(quantized.side, owner)
        if not quantized.decode().isfinite().all():
            raise CorruptArtifact(f"{owner}: its {name} holds values that are not finite")


@contextmanager
def _about(name: object) -> Iterator[None]:
    """Say what an error is about; a recipe that does not fit its tensor is the file's fault here."""
    try:
        yield
    except (CorruptArtifact, PlanError) as error:
        raise CorruptArtifact(f"{name}: {error}") from None


# -- rules that writer and reader share --------------------------------------------------------


def canonical(value: Any) -> bytes:
    """The one JSON text of a value."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return text.encode()


def padding(size: int) -> int:
    """Spaces that fill a header up to a multiple of 8 bytes, so that the data behind it is aligned."""
    return -size % 8


def header_bytes(index: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The header, with its length before and its padding behind."""
    text = canonical({**index, METADATA: metadata})
    size = len(text) + padding(len(text))
    return size.to_bytes(8, "little") + text.ljust(size)


def checksum(index: Mapping[str, Any], metadata: Mapping[str, str], payload: bytes | memoryview) -> str:
    """CRC-32 of the whole file with the checksum's own 8 digits taken as zeros, as 8 hex digits."""
    return f"{zlib.crc32(payload, zlib.crc32(header_bytes(index, {**metadata, 'crc32': '0' * 8}))):08x}"


def file_order(dtypes: Mapping[str, str], coded: Collection[str]) -> list[str]:
    """Dense entries by falling alignment, then coded ones, by name where equal: so all are aligned."""
    return sorted(dtypes, key=lambda name: (name in coded, -DTYPES[dtypes[name]].itemsize, name))
