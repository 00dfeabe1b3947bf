"""Checkpoints as they come from others: a safetensors file, or a folder of shards with an index; every claim checked.

Headers are read, data only when asked for, by seeking: pages of a mapped file would count as memory of the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitbook.artifact.artifact import INPUTS, METADATA
from bitbook.artifact.contents import DTYPES, about, as_object, parse_json, read_claims
from bitbook.artifact.read import split_header
from bitbook.artifact.span import Span
from bitbook.blocks import Shape
from bitbook.errors import CorruptArtifact, PlanError, WeightError

INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_UNSUPPORTED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
_UNSUPPORTED += ("U16", "U32", "U64", "C64")
_MOST_INDEX = 100_000_000  # bytes


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: where its bytes are, row by row, little-endian."""

    name: str
    dtype: str
    shape: Shape
    data: Span

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        return DTYPES[self.dtype].is_floating_point

    def values(self, start: int, stop: int) -> Tensor:
        """Elements in reading order, as they are stored."""
        size = DTYPES[self.dtype].itemsize
        data = self.data.part(start * size, stop * size).read()
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]) if len(data) else torch.empty(0)

    def floats(self, start: int, stop: int) -> Tensor:
        """Elements in reading order, as float32; raises `WeightError` where one is not finite."""
        w = self.values(start, stop).float()
        if not w.isfinite().all():
            at = int((~w.isfinite()).nonzero()[0])
            raise WeightError(
                f"{self.name}: element {start + at} is {w[at].item()}; only finite weights can be quantized"
            )
        return w


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    header: str
    """A hash of the header's text."""
    tensors: Mapping[str, Stored]

    def identity(self) -> dict[str, Any]:
        """What would differ if the file were another one, as far as can be told without reading it all."""
        found = self.path.stat()
        return {"file": self.path.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "header": self.header}


@dataclass(frozen=True)
class Checkpoint:
    """All shards, and the name of the index that lists them; None for a single file."""

    path: Path
    index: str | None
    shards: Sequence[Shard]
    beside: Sequence[str] = ()
    """Other files in the folder."""

    @property
    def tensors(self) -> Iterator[Stored]:
        for shard in self.shards:
            yield from shard.tensors.values()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a `.safetensors` file, or of a folder of them with an index.

    Raises:
        CorruptArtifact: a header or the index is not what it should be; the message says of which file.
        PlanError: the file is compressed already, or has a type that bitbook does not store.
        FileNotFoundError: there is none.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        return Checkpoint(path, None, [read_shard(path)])
    name, files = read_index(path)
    shards = []
    for file, names in sorted(files.items()):
        if not (path / file).is_file():
            raise CorruptArtifact(f"{path / name}: it names the shard {file}, which is not there")
        shard = read_shard(path / file)
        if absent := sorted(names - shard.tensors.keys()):
            raise CorruptArtifact(f"{path / file}: the index says that {absent[0]} is in it, which it is not")
        if extra := sorted(shard.tensors.keys() - names):
            other = next((f for f, held in files.items() if extra[0] in held), None)
            said = f"which the index has in {other}" if other else "which the index does not name"
            raise CorruptArtifact(f"{path / file}: it holds {extra[0]}, {said}")
        shards.append(shard)
    beside = sorted(p.name for p in path.iterdir() if p.name != name and p.name not in files)
    return Checkpoint(path, name, shards, beside)


def read_index(folder: Path) -> tuple[str, dict[str, set[str]]]:
    """The name of a folder's index, and which tensors it says are in which file."""
    found = sorted(p.name for p in folder.iterdir() if p.name.endswith(INDEX_SUFFIX))
    if len(found) != 1:
        what = f"has {len(found)} of them: {', '.join(found)}" if found else "has none"
        raise CorruptArtifact(f"{folder}: shards come with one index, *{INDEX_SUFFIX}, and the folder {what}")
    path = folder / found[0]
    if path.stat().st_size > _MOST_INDEX:
        raise CorruptArtifact(f"{path}: an index has at most {_MOST_INDEX} bytes")
    with about(path):
        whole = as_object(parse_json(path.read_bytes(), "the index"), "the index")
        places = as_object(whole.get("weight_map"), "weight_map")
        files: dict[str, set[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str) or not _is_plain(file):
                raise CorruptArtifact(
                    f"{name} is said to be in {str(file)[:80]!r}, which is no *{_SUFFIX} beside the index"
                )
            files.setdefault(file, set()).add(name)
    return found[0], files


def index_extras(folder: Path) -> Mapping[str, Any]:
    """What an index says beside the places of tensors."""
    name, _ = read_index(folder)
    extras = json.loads((folder / name).read_bytes()).get("metadata")
    return extras if isinstance(extras, dict) else {}


def read_shard(path: Path) -> Shard:
    """The header of one file; raises as `open_checkpoint`."""
    if not path.name.endswith(_SUFFIX):
        raise CorruptArtifact(f"{path}: a checkpoint is a {_SUFFIX} file, or a folder of them with an index")
    with of_file(path):
        text, data = split_header(Span.of(path))
        index = as_object(parse_json(text.rstrip(b" "), "the header"), "the header")
        extras = as_object(index.pop(METADATA, {}), METADATA)
        if not all(isinstance(value, str) for value in extras.values()):
            raise CorruptArtifact(f"{METADATA} does not map texts to texts")
        if "bitbook" in extras or index.keys() == {"bitbook"}:
            raise PlanError("it is compressed already; first run 'bitbook decompress'")
        if INPUTS in index:
            raise PlanError(f"the name {INPUTS!r} is reserved by the file format; rename the tensor")
        for name, claim in index.items():
            if isinstance(claim, dict) and claim.get("dtype") in _UNSUPPORTED:
                raise PlanError(f"{name}: its type {claim['dtype']} cannot be stored; use one of {', '.join(DTYPES)}")
        tensors = {}
        for name, (dtype, shape, offsets) in read_claims(index).items():
            with about(name):
                size = DTYPES[dtype].itemsize * math.prod(shape)
                whole = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
                if not whole or not 0 <= offsets[0] <= offsets[1] <= len(data) or offsets[1] - offsets[0] != size:
                    raise CorruptArtifact(
                        f"{size} bytes of {dtype} are said to be at {str(offsets)[:80]} of {len(data)} bytes of data"
                    )
                tensors[name] = Stored(name, dtype, shape, data.part(*offsets))
        end = data.start
        for stored in sorted(tensors.values(), key=lambda t: (t.data.start, t.data.stop)):
            if stored.data.start != end:
                what = "overlaps what is before it" if stored.data.start < end else "leaves a hole before it"
                raise CorruptArtifact(f"{stored.name}: its data {what}")
            end = stored.data.stop
        if end != data.stop:
            raise CorruptArtifact(f"{data.stop - end} bytes of data belong to no tensor")
    return Shard(path, hashlib.sha256(text).hexdigest(), tensors)


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Say which file an error is about, and leave it the error that it is."""
    try:
        yield
    except (CorruptArtifact, PlanError) as error:
        raise type(error)(f"{path}: {error}") from None


def _is_plain(file: str) -> bool:
    """Whether a name stays within its folder."""
    return file.endswith(_SUFFIX) and not set(file) & set("/\\\0:") and not file.startswith(".")
