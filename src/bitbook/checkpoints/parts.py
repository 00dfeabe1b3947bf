"""Parts: what is finished of a checkpoint, a file per tensor in a folder beside the output; and the job that makes one.

    part: a line of JSON (what it is of, its size and checksum) · the bytes of the tensor's entry

A part appears under its name when it is whole, so whatever is there after a kill −9 was finished; its checksum says
whether it still is what was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitbook.artifact.contents import CODERS, dense_bytes, dense_type, is_coded, streams_of
from bitbook.artifact.per_tensor import Entry
from bitbook.artifact.span import Span
from bitbook.artifact.write import whole
from bitbook.checkpoints.rate import Histogram, corrected, step_for
from bitbook.checkpoints.slabs import Encoded, encode, slabs
from bitbook.checkpoints.source import Stored
from bitbook.errors import BitbookError, CheckpointError
from bitbook.plan import recipe_from_json, recipe_to_json
from bitbook.quantizer import FitOptions, Quantizer

MANIFEST = "manifest.json"
_MOST_LINE = 1 << 20  # bytes
_FEW = 1000  # weights below which a table weighs so much that only codes are held to the bits
_MOST_TRIES = 5
_ABOVE, _BELOW = 0.004, 0.006  # shares of the bits asked for that a file may miss them by


@dataclass(frozen=True)
class Job:
    """One tensor to encode; everything that a worker needs to know."""

    stored: Stored
    recipe: Quantizer
    bits: float | None
    """Bits per weight to seek a step for, of `ECSQ()`."""
    coder: str
    seed: int
    part: Path
    work: str
    """The digest of the manifest that this is a part of."""


@dataclass(frozen=True)
class Part:
    """One finished tensor."""

    name: str
    entry: Entry
    recipe: Quantizer
    error: float
    power: float
    data: Span


def make(job: Job) -> str:
    """Encode a tensor, write its part, and return the tensor's name."""
    if job.bits is None:
        encoded = encode(job.stored, job.recipe, FitOptions(), job.seed)
        data = _data(job, encoded)
    else:
        encoded, data = _at_bits(job, job.bits)
    quantized = encoded.quantized
    entry = (
        Entry.of_codes(len(data))
        if is_coded(quantized)
        else Entry(dense_type(job.stored.name, quantized), tuple(quantized.shape), False)
    )
    line = {
        "coded": entry.coded,
        "crc32": zlib.crc32(data),
        "dtype": entry.dtype,
        "error": encoded.error,
        "name": job.stored.name,
        "power": encoded.power,
        "recipe": recipe_to_json(quantized.recipe),
        "size": len(data),
        "work": job.work,
    }
    with whole(job.part) as file:
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        file.write(data)
    return job.stored.name


def find(job: Job) -> Part | None:
    """The part of a job, if it is there and whole."""
    try:
        span = Span.of(job.part)
        head = bytes(span.part(0, min(len(span), _MOST_LINE)).read()).partition(b"\n")[0]
        line = json.loads(head)
        data = span.part(len(head) + 1, len(span))
        crc = 0
        for piece in data.chunks():
            crc = zlib.crc32(piece, crc)
        told = line["work"], line["name"], line["size"], line["crc32"]
        if told != (job.work, job.stored.name, len(data), crc):
            return None
        entry = Entry.of_codes(len(data)) if line["coded"] else Entry(line["dtype"], job.stored.shape, False)
        return Part(line["name"], entry, recipe_from_json(line["recipe"]), line["error"], line["power"], data)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, BitbookError):
        return None  # none, or one that was damaged: it is made again


def memory(job: Job) -> int:
    """Bytes that a job takes, about: codes, what they become, and a slab with what is computed from it."""
    n, shape = job.stored.numel, job.stored.shape
    cut = slabs(job.recipe, shape)
    if cut is None:
        return 48 * n
    few = all(spec.alphabet is not None and spec.alphabet <= 256 for spec in job.recipe.layout(shape))
    codes = (1 if few else 4) * n
    coded = int(n * (8.0 if job.bits is None else job.bits) / 8)
    fit = 10 * n if job.bits is None and cut[0].blocks is None else 0
    return max(codes + 3 * coded, fit) + 64 * max(c.stop - c.start for c in cut) + (20 << 20)


def _data(job: Job, encoded: Encoded) -> bytes:
    if is_coded(encoded.quantized):
        return CODERS[job.coder].encode(streams_of(job.stored.name, encoded.quantized))
    return dense_bytes(encoded.quantized)


def _at_bits(job: Job, bits: float) -> tuple[Encoded, bytes]:
    """`ECSQ()` at the step where the tensor's bytes are `bits` per weight: by its entropy, then by what was written."""
    count = math.prod(job.stored.shape)
    step = step_for(Histogram.of(job.stored), bits)
    best: tuple[float, Encoded, bytes] | None = None
    tried: set[float] = set()
    while step not in tried and len(tried) < _MOST_TRIES:
        tried.add(step)
        encoded = encode(job.stored, job.recipe, FitOptions(step=step), job.seed)
        data = _data(job, encoded)
        excess = 8 * len(data) / count - bits
        miss = excess / _ABOVE if excess > 0 else -excess / _BELOW
        if best is None or miss < best[0]:
            best = miss, encoded, data
        if miss <= bits or count < _FEW or not encoded.power:
            break
        step = corrected(step, excess + _BELOW * bits / 4)
    assert best is not None
    return best[1:]


# -- the folder --------------------------------------------------------------------------------


def digest(manifest: Any) -> str:
    """What tells one work from another."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def open_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the work folder, or go on in it; raises `CheckpointError` where it belongs to other work."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        if folder.is_dir() and any(not p.name.startswith(f".{MANIFEST}.") for p in folder.iterdir()):
            raise CheckpointError(f"{folder} is in the way and not bitbook's; remove it or write elsewhere") from None
        folder.mkdir(exist_ok=True)
        with whole(path) as file:
            file.write(json.dumps(manifest, indent=1).encode())
        return
    except ValueError:
        found = None
    if found != manifest and not any(folder.glob("*.part")):  # nothing is lost
        with whole(path) as file:
            file.write(json.dumps(manifest, indent=1).encode())
    elif found != manifest:
        named = {"source": "the source", "asked": "the recipe or bits", "bitbook": "bitbook's version"}
        known = found if isinstance(found, dict) else {}
        changed = [text for key, text in named.items() if known.get(key) != manifest.get(key)]
        raise CheckpointError(
            f"{folder} holds parts of other work: {' and '.join(changed) or 'the manifest'} changed since; "
            "remove the folder to begin anew, or give the command as it was"
        )


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose parts are not there."""
    return [job for job in jobs if find(job) is None]


def remove_folder(folder: Path) -> None:
    """Remove a work folder; under its name, it is there as a whole or not at all."""
    doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
