"""A checkpoint to a small file, or a folder of shards to a folder of small ones.

headers ─► what becomes of each tensor ─► jobs ─engine─► parts ─► files of format 1, streamed from parts and source
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitbook.artifact import per_tensor
from bitbook.artifact.contents import CODERS, DTYPES, float_type, plan_of
from bitbook.artifact.ledger import HEADER
from bitbook.artifact.per_tensor import Entry
from bitbook.artifact.read import read_ledger
from bitbook.artifact.write import LARGE, whole
from bitbook.checkpoints import parts
from bitbook.checkpoints.engines import FREE, Engine, Here, Processes, cores
from bitbook.checkpoints.parts import Job, Part
from bitbook.checkpoints.rate import check_bits
from bitbook.checkpoints.source import Checkpoint, Shard, Stored, open_checkpoint
from bitbook.coding.fixed import packed_size
from bitbook.errors import CheckpointError, CorruptArtifact, PlanError
from bitbook.plan import Plan
from bitbook.quantizer import Quantized, Quantizer, stream_specs
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float

_DONE = "published"  # a file that says that nothing but the work folder is left to remove

_SMALL, _FEW_BITS = 1_000_000, 5
"""Weights and bits up to which "Smallest" is worth its time: it decides each magnitude step by step."""

AfterTensor = Callable[[str, int], None]
"""Called with a tensor's name and its bytes in the source, or in what is written, when it is finished."""


class Row(NamedTuple):
    """What became of one tensor."""

    file: str
    tensor: str
    stored_as: str
    dense: str | None
    """Why it is not quantized."""
    shape: tuple[int, ...]
    bytes: int
    weights: int
    relative_error: float | None
    """Squared error over squared weights; None where it is dense, or zero."""


@dataclass(frozen=True)
class Compressed:
    """What was written."""

    output: Path
    bytes: int
    """Of all files, an index included."""
    rows: Sequence[Row]
    source_bytes: int
    beside: Sequence[str]
    """Files in the source's folder that were not copied."""
    reused: int
    """Tensors that an earlier, interrupted call had finished."""

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def bits(self) -> float:
        """Bits per quantized weight, side tensors and tables included; NaN without quantized tensors."""
        coded = [row for row in self.rows if row.dense is None and row.weights]
        return 8 * sum(r.bytes for r in coded) / sum(r.weights for r in coded) if coded else math.nan


def compress_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    bits: float | None = None,
    plan: Plan | Quantizer | None = None,
    layers: Sequence[str] = (),
    coder: str | None = None,
    engine: Engine | None = None,
    after_tensor: AfterTensor | None = None,
    start: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Compressed:
    """Compress a `.safetensors` file, or a folder of shards with its index, tensor by tensor.

    Finished tensors wait in `<output>.parts`; after an interruption the same call goes on from there.  Without `plan`
    or `layers`, all floating-point tensors with two or more axes are quantized.

    Args:
        source: the checkpoint.
        output: a file, or, for a folder of shards, a folder that is not there yet.
        bits: bits per weight of each tensor, by `ECSQ()`; side tensors and tables of frequencies included.
        plan: instead of bits, a plan, or one recipe.
        layers: with bits or one recipe, patterns of the tensors it is for.
        coder: by name; None: "Smallest" for fewer than 10^6 weights of at most 5 bits, else "Rans".
        engine: who encodes; None: as many processes as there are processors, or for fewer than 10^7 weights this one.
        after_tensor: progress.
        start: called once with the number of tensors and of source bytes that are left to encode.
        seed: of k-means, for each tensor anew.

    Raises:
        CorruptArtifact: the source is damaged.
        PlanError: options or recipes that do not fit.
        WeightError: a tensor holds NaN or infinity; the message names it.
        CheckpointError: the output is in the way, the source changed, a worker died.
        OSError: no room on the disk, and what else disks say.
    """
    checkpoint = open_checkpoint(source)
    output = Path(output).absolute()
    chosen = _choose(checkpoint, bits, plan, layers)
    count = sum(stored.numel for stored in checkpoint.tensors if isinstance(chosen[stored.name], Quantizer))
    coder = coder or ("Smallest" if count < _SMALL and (bits or 0) <= _FEW_BITS else "Rans")
    if coder not in CODERS:
        raise PlanError(f"no coder {coder!r}; there are {', '.join(CODERS)}")
    engine = engine or (Here() if count < LARGE or cores() == 1 else Processes(cores()))
    folder = output.with_name(output.name + ".parts")
    check_place(checkpoint.path, output, is_folder=checkpoint.index is not None, finished=(folder / _DONE).exists())
    finished = (folder / _DONE).exists() and output.exists()
    manifest = _manifest(checkpoint, bits, plan, layers, coder, seed)
    with _explained(folder):
        parts.open_folder(folder, manifest)
        work = parts.digest(manifest)
        jobs = [
            Job(stored, recipe, bits, coder, seed, folder / f"{i:05d}.part", work)
            for i, stored in enumerate(checkpoint.tensors)
            if isinstance(recipe := chosen[stored.name], Quantizer)
        ]
        if not finished:
            todo = parts.missing(jobs)
            reused = len(jobs) - len(todo)
            if start is not None:
                start(len(todo), sum(len(job.stored.data) for job in todo))
            _check_room(folder, todo)
            bytes_of = {job.stored.name: len(job.stored.data) for job in todo}
            largest = max((stored.numel for stored in checkpoint.tensors), default=0)
            for name in engine.run(parts.make, todo, [parts.memory(job) for job in todo], 12 * largest + FREE):
                if after_tensor is not None:
                    after_tensor(name, bytes_of[name])
        else:
            reused = len(jobs)
        found = {job.stored.name: parts.find(job) for job in jobs}
        if lost := [name for name, part in found.items() if part is None]:
            raise CheckpointError(f"{folder}: the part of {lost[0]} is damaged or gone; run the command again")
        ready = {name: part for name, part in found.items() if part is not None}
        if finished:
            ledgers = {shard.path.name: _sizes(output / shard.path.name) for shard in checkpoint.shards}
        else:
            ledgers = _assemble(checkpoint, ready, output, folder, coder, manifest)
        rows = _report(checkpoint, chosen, ready, ledgers, output)
        total = sum(p.stat().st_size for p in output.iterdir()) if output.is_dir() else output.stat().st_size
        parts.remove_folder(folder)
    return Compressed(output, total, rows, _source_size(checkpoint), checkpoint.beside, reused)


def plan_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    bits: float | None = None,
    plan: Plan | Quantizer | None = None,
    layers: Sequence[str] = (),
) -> Compressed:
    """What `compress_checkpoint` would write at fixed width, by the coder "Fixed", from the shards' headers alone.

    Sizes are exact, but for codebooks: where fewer different blocks than codewords are found, the file has fewer.
    With `bits`, whose codes have no fixed width, they are what is aimed at. Nothing is written.
    Raises `PlanError` where the plan does not fit, or codes have no bound.
    """
    from bitbook.sizes import blank

    checkpoint = open_checkpoint(source)
    chosen = _choose(checkpoint, bits, plan, layers)
    output = Path(output).absolute()
    rows, sizes = [], {}
    for shard in checkpoint.shards:
        file = shard.path.name if checkpoint.index is not None else output.name
        entries: dict[str, Entry] = {}
        coded: dict[str, tuple[tuple[int, ...], Quantizer]] = {}
        for name, stored in shard.tensors.items():
            recipe = chosen[name]
            entries[name] = Entry(stored.dtype, stored.shape, False)
            why = None if isinstance(recipe, Quantizer) else recipe
            kind = _dtype_text(stored.dtype)
            if isinstance(recipe, Quantizer):
                try:
                    size, recipe = _planned(recipe, stored, bits, blank)
                except PlanError as error:
                    raise PlanError(f"{name}: {error}") from None
                kind = repr(recipe)
                if isinstance(recipe, Float):
                    entries[name] = Entry(float_type(recipe), stored.shape, False)
                else:
                    entries[name], coded[name] = Entry.of_codes(size), (stored.shape, recipe)
            rows.append(Row(file, name, kind, why, stored.shape, entries[name].size, stored.numel, None))
        text = plan_of(coded, {}, {}, {}, CODERS["Fixed"], per_tensor.DEFAULT_CODER)
        front = per_tensor.header_size(entries, text)
        rows.append(Row(file, HEADER, "", None, (), front, 0, None))
        sizes[shard.path.name] = front + sum(entry.size for entry in entries.values())
    total = sum(sizes.values()) + (len(_index(checkpoint, sum(sizes.values()))) if checkpoint.index is not None else 0)
    return Compressed(output, total, rows, _source_size(checkpoint), checkpoint.beside, 0)


def _planned(
    recipe: Quantizer, stored: Stored, bits: float | None, blank: Callable[[Quantizer, tuple[int, ...]], Quantized]
) -> tuple[int, Quantizer]:
    """The bytes of a tensor's codes at fixed width, or as many as `bits` asks for, and its recipe, made absolute."""
    if bits is not None:
        return math.ceil(bits * stored.numel / 8), recipe
    stand_in = blank(recipe, stored.shape)
    specs = stream_specs(stand_in.recipe, stored.shape)
    return sum(packed_size(spec.alphabet or 1, math.prod(spec.grid)) for spec in specs), stand_in.recipe


def _source_size(checkpoint: Checkpoint) -> int:
    return sum(shard.path.stat().st_size for shard in checkpoint.shards)


def check_place(source: Path, output: Path, *, is_folder: bool, finished: bool = False) -> None:
    """Raise before any work is done where the output would be an input, or is in the way."""
    if output.exists() and output.samefile(source):
        raise PlanError(f"{output} is an input of this command; write to another place")
    if not output.parent.is_dir():
        raise PlanError(f"{output} cannot be written: there is no folder {output.parent}")
    if is_folder and output.exists() and not finished:
        raise CheckpointError(f"{output} exists; remove it, or write to another place")
    if not is_folder and output.is_dir():
        raise PlanError(f"{output} is a folder; name a file to write")


def _choose(
    checkpoint: Checkpoint, bits: float | None, plan: Plan | Quantizer | None, layers: Sequence[str]
) -> dict[str, Quantizer | str]:
    """The recipe of each tensor, or why it stays dense."""
    if (bits is None) == (plan is None):
        raise PlanError("pass either bits or a recipe or plan")
    if bits is not None:
        check_bits(bits)
    if isinstance(plan, Plan):
        if layers:
            raise PlanError("layers go with bits or one recipe; a plan says both itself")
        if plan.inputs:
            raise PlanError("a checkpoint has no modules whose inputs could be quantized; leave 'inputs' out")
        matched = plan
    else:
        recipe = ECSQ() if plan is None else plan
        tall = [escape(stored.name) for stored in checkpoint.tensors if len(stored.shape) >= 2]
        matched = Plan(dict.fromkeys(layers or tall, recipe))
    recipes = matched.recipes([stored.name for stored in checkpoint.tensors])
    by_plan = isinstance(plan, Plan)
    return {
        stored.name: _chosen(stored, recipes[stored.name], named=matched.names(stored.name), by_plan=by_plan)
        for stored in checkpoint.tensors
    }


def _chosen(stored: Stored, recipe: Quantizer | None, *, named: bool, by_plan: bool) -> Quantizer | str:
    if not stored.floating:
        return "no floating-point numbers"
    if not stored.numel:
        return "empty"
    if recipe is not None:
        try:  # before any work
            recipe.resolve(stored.shape).layout(stored.shape)
        except PlanError as error:
            raise PlanError(f"{stored.name}: {error}") from None
        return recipe
    if by_plan:
        return "by plan" if named else "no pattern names it"
    return "fewer than two axes" if len(stored.shape) < 2 else "no pattern names it"


def _manifest(
    checkpoint: Checkpoint,
    bits: float | None,
    plan: Plan | Quantizer | None,
    layers: Sequence[str],
    coder: str,
    seed: int,
) -> dict[str, Any]:
    from bitbook import __version__

    recipe = plan.to_json() if isinstance(plan, Plan) else None if plan is None else repr(plan)
    asked = {"bits": bits, "plan": recipe, "layers": list(layers), "coder": coder, "seed": seed}
    return {"asked": asked, "bitbook": __version__, "source": [shard.identity() for shard in checkpoint.shards]}


def _check_room(folder: Path, jobs: Sequence[Job]) -> None:
    """Parts and output stand beside each other for a while."""
    needed = 2 * sum(int(job.stored.numel * (job.bits or 1) / 8) for job in jobs)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder}: parts and output need about {needed:,} bytes, and {free:,} are free")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what to do about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CheckpointError(
            f"{folder}: no room left on the disk; make some and run the command again, which goes on from here"
        ) from error


# -- files -------------------------------------------------------------------------------------


def _assemble(
    checkpoint: Checkpoint,
    ready: Mapping[str, Part],
    output: Path,
    folder: Path,
    coder: str,
    manifest: Mapping[str, Any],
) -> dict[str, dict[str, int]]:
    """Write files from parts and source into the work folder, check them, and give them their names.

    Returns the bytes of each tensor by file.
    """
    before = folder / "output"
    if before.exists():
        shutil.rmtree(before)
    before.mkdir()
    ledgers = {}
    for shard in checkpoint.shards:
        write_file(before / shard.path.name, shard, ready, coder)
        ledgers[shard.path.name] = _sizes(before / shard.path.name)  # reads it as a reader would, checksum included
    if checkpoint.index is not None:
        with whole(before / checkpoint.index) as file:
            file.write(_index(checkpoint, sum((before / s.path.name).stat().st_size for s in checkpoint.shards)))
    if manifest["source"] != [shard.identity() for shard in checkpoint.shards]:
        raise CheckpointError(f"{checkpoint.path} changed while it was read; remove {folder} and begin anew")
    if checkpoint.index is None:
        os.replace(before / checkpoint.shards[0].path.name, output)
        return ledgers
    with whole(folder / _DONE):
        pass
    before.rename(output)
    return ledgers


def _sizes(path: Path) -> dict[str, int]:
    return read_ledger(path, max_elements=1 << 62).by_tensor()


def write_file(path: Path, shard: Shard, ready: Mapping[str, Part], coder: str) -> None:
    """One file of format 1, the same bytes as `save(artifact, path, coder, "per-tensor")` writes for this content."""
    coded = {name: ready[name] for name in shard.tensors if name in ready and ready[name].entry.coded}
    entries = {
        name: ready[name].entry if name in ready else Entry(stored.dtype, stored.shape, False)
        for name, stored in shard.tensors.items()
    }

    def content(name: str) -> Iterator[memoryview]:
        stored = ready[name] if name in ready else shard.tensors[name]
        for piece in stored.data.chunks():
            if entries[name].dtype == "BOOL" and (np.frombuffer(piece, np.uint8) > 1).any():
                raise CorruptArtifact(f"{shard.path}: {name}: a boolean is neither 0 nor 1")
            yield piece

    plan = plan_of(
        {name: (shard.tensors[name].shape, part.recipe) for name, part in coded.items()},
        {},
        {},
        {},
        CODERS[coder],
        per_tensor.DEFAULT_CODER,
    )
    with whole(path) as file:
        per_tensor.write(file, entries, plan, content)


def _index(checkpoint: Checkpoint, size: int) -> bytes:
    """The index of compressed shards of `size` bytes in all; it keeps each tensor's type, which format 1 does not."""
    types = [stored.dtype for stored in checkpoint.tensors]
    common = max(sorted(set(types)), key=types.count, default="F32")
    others = {stored.name: stored.dtype for stored in checkpoint.tensors if stored.dtype != common}
    metadata: dict[str, Any] = {"total_size": size, "dtype": common} | ({"dtypes": others} if others else {})
    places = {name: shard.path.name for shard in checkpoint.shards for name in shard.tensors}
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=1, sort_keys=True).encode()


def _report(
    checkpoint: Checkpoint,
    chosen: Mapping[str, Quantizer | str],
    ready: Mapping[str, Part],
    ledgers: Mapping[str, Mapping[str, int]],
    output: Path,
) -> list[Row]:
    """A row for each tensor, and one for each file's header."""
    rows = []
    for shard in checkpoint.shards:
        file = shard.path.name if checkpoint.index is not None else output.name
        for name, size in ledgers[shard.path.name].items():
            stored, part = shard.tensors.get(name), ready.get(name)
            if stored is None:
                rows.append(Row(file, name, "", None, (), size, 0, None))
                continue
            kind, why = (repr(part.recipe), None) if part else (_dtype_text(stored.dtype), str(chosen[name]))
            error = part.error / part.power if part and part.power else None
            rows.append(Row(file, name, kind, why, stored.shape, size, stored.numel, error))
    return rows


def _dtype_text(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
