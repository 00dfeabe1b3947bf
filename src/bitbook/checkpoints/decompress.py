"""Small files back to a checkpoint that any program reads: each tensor decoded into its place, some rows at a time."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitbook.artifact.artifact import METADATA
from bitbook.artifact.contents import DTYPES, Dense, File, Group, canonical
from bitbook.artifact.read import from_bytes, parse, read_coded
from bitbook.artifact.span import Span
from bitbook.artifact.write import whole
from bitbook.blocks import Shape
from bitbook.checkpoints import slabs
from bitbook.checkpoints.compress import AfterTensor, check_place
from bitbook.checkpoints.engines import FREE, Engine, Here, Processes, cores
from bitbook.checkpoints.source import index_extras, of_file, read_index
from bitbook.coding.coder import Coder
from bitbook.errors import CorruptArtifact, PlanError

FLOATS: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_MANY = 10_000_000  # elements from which on several processes are worth their start


@dataclass(frozen=True)
class Job:
    """One tensor to decode, or to copy, into one or more places of a file."""

    name: str
    content: Group | Dense
    coder: Coder
    dtype: str
    output: Path
    places: Sequence[int]


@dataclass(frozen=True)
class Decompressed:
    """What was written."""

    output: Path
    tensors: int
    bytes: int
    source_bytes: int
    inputs: Sequence[str]
    """Modules whose inputs the source quantizes, too, which plain weights cannot."""


def decompress_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    engine: Engine | None = None,
    after_tensor: AfterTensor | None = None,
    start: Callable[[int, int], None] | None = None,
) -> Decompressed:
    """Write the tensors of a file, or of a folder of them with an index, as plain safetensors.

    Dense tensors stay as stored, and each name of a tied tensor gets a copy.

    Args:
        source: what `save` or `compress_checkpoint` wrote.
        output: a file, or, for a folder, a folder that is not there yet.
        dtype: of quantized tensors: "float32", "bfloat16" or "float16"; None: for a folder, each tensor's own as the
            index has it; for a file, which does not know it, float32.
        engine: who decodes; None: as many processes as there are processors, or for few elements this one.
        after_tensor: progress.
        start: called for each file with its number of tensors and the bytes that they will have.

    Raises as `read`, and `PlanError` and `CheckpointError` where the output is in the way.
    """
    source, output = Path(source).absolute(), Path(output).absolute()
    if dtype is not None and dtype not in FLOATS:
        raise PlanError(f"no dtype {dtype!r}; there are {', '.join(FLOATS)}")
    check_place(source, output, is_folder=source.is_dir())
    told = _Told(engine, after_tensor, start)
    wanted = FLOATS[dtype] if dtype else "F32"
    if not source.is_dir():
        with whole(output) as file:
            tensors, inputs = _write(source, Path(file.name), lambda name: wanted, told)
        return Decompressed(output, len(tensors), output.stat().st_size, source.stat().st_size, inputs)
    index, files = read_index(source)
    extras = index_extras(source)
    types = _types(source / index, extras)
    places: dict[str, str] = {}
    every: list[str] = []
    with _whole_folder(output) as folder:
        for name, named in sorted(files.items()):
            if not (source / name).is_file():
                raise CorruptArtifact(f"{source / index}: it names the file {name}, which is not there")
            with open(folder / name, "xb"):
                pass
            tensors, own = _write(source / name, folder / name, (lambda _: wanted) if dtype else types, told)
            if differing := sorted(named ^ tensors.keys()):
                raise CorruptArtifact(f"{source / name}: file and index do not agree about {differing[0]}")
            every += own
            places |= dict.fromkeys(tensors, name)
        size = sum((folder / name).stat().st_size for name in files)
        with open(folder / index, "xb") as file:
            whole_index = {"metadata": {"total_size": size}, "weight_map": places}
            file.write(json.dumps(whole_index, indent=1, sort_keys=True).encode())
    sizes = [sum(p.stat().st_size for p in place.iterdir() if p.is_file()) for place in (output, source)]
    return Decompressed(output, len(places), sizes[0], sizes[1], every)


@dataclass(frozen=True)
class _Told:
    engine: Engine | None
    after_tensor: AfterTensor | None
    start: Callable[[int, int], None] | None


def _write(
    source: Path, output: Path, dtype_of: Callable[[str], str], told: _Told
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Fill a file with the tensors of another; returns what is in it, and modules with quantized inputs."""
    with of_file(source):
        data = Span.of(source)
        file = parse(data, None)
        aliases = file.plan.aliases
        found: dict[str, tuple[str, Shape]] = {
            name: (dtype_of(name), shape) for name, (shape, _) in file.plan.coded.items()
        }
        found |= {entry.name: (entry.dtype, entry.shape) for entry in file.entries if isinstance(entry, Dense)}
        found |= {alias: found[name] for alias, name in aliases.items()}
        header, places = plain_header(found)
        with open(output, "r+b") as out:
            out.write(header)
            out.truncate(len(header) + sum(_size(*claim) for claim in found.values()))
        at = {name: len(header) + place for name, place in places.items()}
        every = {name: [name, *(a for a, n in aliases.items() if n == name)] for name in found.keys() - aliases.keys()}
        if any(isinstance(entry, Group) and len(entry.tensors) > 1 for entry in file.entries):
            _write_together(data, output, found, {name: [at[n] for n in names] for name, names in every.items()})
        else:
            jobs = list(_jobs(file, output, found, {name: [at[n] for n in names] for name, names in every.items()}))
            _run(jobs, found, told)
    with open(output, "r+b") as out:
        os.fsync(out.fileno())
    return found, list(file.plan.activations)


def _jobs(
    file: File, output: Path, found: Mapping[str, tuple[str, Shape]], places: Mapping[str, Sequence[int]]
) -> Iterator[Job]:
    for entry in file.entries:
        if isinstance(entry, Dense):
            yield Job(entry.name, entry, file.plan.coder, entry.dtype, output, places[entry.name])
        elif entry.tensors:
            (tensor,) = entry.tensors
            group = entry._replace(inputs=())
            yield Job(tensor.name, group, file.plan.coder, found[tensor.name][0], output, places[tensor.name])


def _run(jobs: Sequence[Job], found: Mapping[str, tuple[str, Shape]], told: _Told) -> None:
    counts = [math.prod(found[job.name][1]) for job in jobs]
    few = sum(counts) < _MANY or cores() == 1
    engine = told.engine or (Here() if few else Processes(cores()))
    sizes = {job.name: _size(*found[job.name]) for job in jobs}
    if told.start is not None:
        told.start(len(jobs), sum(sizes.values()))
    limit = 12 * max(counts, default=0) + FREE
    for name in engine.run(write_tensor, jobs, [memory(job) for job in jobs], limit):
        if told.after_tensor is not None:
            told.after_tensor(name, sizes[name])


def write_tensor(job: Job) -> str:
    """Decode or copy a tensor into its places, and return its name."""
    with open(job.output, "r+b") as file:
        if isinstance(job.content, Dense):
            at = 0
            for piece in job.content.data.chunks():
                if job.dtype == "BOOL" and (np.frombuffer(piece, np.uint8) > 1).any():
                    raise CorruptArtifact(f"{job.name}: a boolean is neither 0 nor 1")
                _put(file, piece, job.places, at)
                at += len(piece)
            return job.name
        kind = DTYPES[job.dtype]
        for first, values in slabs.decode(read_coded(job.content, job.coder)):
            for start in range(0, len(values), slabs.ELEMENTS):
                own = _as(job.name, values[start : start + slabs.ELEMENTS], kind)
                _put(file, own.view(torch.uint8).numpy(), job.places, (first + start) * kind.itemsize)
    return job.name


def memory(job: Job) -> int:
    """Bytes that a job takes, about."""
    if isinstance(job.content, Dense):
        return 8 << 20
    (tensor,) = job.content.tensors
    n = math.prod(tensor.shape)
    cut = slabs.slabs(tensor.recipe, tensor.shape)
    if cut is None:
        return 40 * n
    return 5 * n + 3 * len(job.content.data) + 64 * max(c.stop - c.start for c in cut) + (20 << 20)


def _write_together(
    data: Span, output: Path, found: Mapping[str, tuple[str, Shape]], places: Mapping[str, Sequence[int]]
) -> None:
    """A file of format 2, whose tensors were coded together: small ones, so all of it is in memory."""
    artifact = from_bytes(data.read())
    with open(output, "r+b") as file:
        for name, at in places.items():
            tensor = _as(name, artifact.decode(name).detach().contiguous().reshape(-1), DTYPES[found[name][0]])
            _put(file, tensor.view(torch.uint8).numpy(), at, 0)


def _as(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another float type; raises `PlanError` where they do not fit into it."""
    converted = values.to(dtype)
    if values.is_floating_point() and dtype != values.dtype and not converted.isfinite().all():
        largest = values.abs().max().item()
        raise PlanError(f"{name}: {largest:g} does not fit into {str(dtype).removeprefix('torch.')}; use float32")
    return converted


def _put(file: Any, data: memoryview | np.ndarray, places: Sequence[int], offset: int) -> None:
    for place in places:
        file.seek(place + offset)
        file.write(data)


def plain_header(tensors: Mapping[str, tuple[str, Shape]]) -> tuple[bytes, dict[str, int]]:
    """The header of a plain safetensors file, and where each tensor's data begin behind it."""
    index: dict[str, Any] = {METADATA: {"format": "pt"}}
    places: dict[str, int] = {}
    start = 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
        dtype, shape = tensors[name]
        stop = start + _size(dtype, shape)
        index[name] = {"data_offsets": [start, stop], "dtype": dtype, "shape": list(shape)}
        places[name], start = start, stop
    text = canonical(index)
    text = text.ljust(len(text) + -len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _size(dtype: str, shape: Shape) -> int:
    return DTYPES[dtype].itemsize * math.prod(shape)


def _types(path: Path, extras: Mapping[str, Any]) -> Callable[[str], str]:
    """Each tensor's own type, as the index of compressed shards has it; float32 where it does not say."""
    common, others = extras.get("dtype", "F32"), extras.get("dtypes", {})
    if not isinstance(others, dict) or any(kind not in DTYPES for kind in (common, *others.values())):
        raise CorruptArtifact(f"{path}: its metadata name types that there are not; there are {', '.join(DTYPES)}")

    def own(name: str) -> str:
        dtype = others.get(name, common)
        return dtype if DTYPES[dtype].is_floating_point else "F32"

    return own


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes its name when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
