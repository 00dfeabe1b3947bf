"""Content to bytes: the same content gives the same bytes, in any order and any process.

The rules and their reasons are in FORMAT.md, beside this file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bitbook.artifact.artifact import INPUTS, Artifact
from bitbook.artifact.ledger import Ledger
from bitbook.artifact.read import (
    CODERS,
    DEFAULT_CODER,
    DTYPES,
    VERSION,
    canonical,
    checksum,
    file_order,
    header_bytes,
    ledger_from_bytes,
)
from bitbook.blocks import Shape
from bitbook.coding.coder import Coder
from bitbook.coding.fixed import Fixed
from bitbook.errors import PlanError
from bitbook.plan import recipe_to_json
from bitbook.quantizer import Quantized, stream_specs
from bitbook.scalar.leaves import Float

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_T = TypeVar("_T")


def save(artifact: Artifact, path: str | os.PathLike[str], coder: Coder = Fixed()) -> Ledger:
    """Write a file, whole or not at all, and return its ledger; raises `PlanError` as `to_bytes` does."""
    data, ledger = to_bytes(artifact, coder)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # renaming works within one folder only
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return ledger


def to_bytes(artifact: Artifact, coder: Coder = Fixed()) -> tuple[bytes, Ledger]:
    """The file's bytes, and what each of them is for.

    Raises `PlanError` for a type, a name or a coder that the format does not have, and for a recipe that is
    still relative to a shape.
    """
    entries = {name: _entry(name, tensor, coder) for name, tensor in artifact.tensors.items()}
    streams = [
        stream
        for _, quantized in sorted(artifact.inputs.items())
        for _, side in quantized.side.items()
        for stream in side.streams()
    ]
    if streams:
        entries[INPUTS] = _coded(coder.encode(streams))
    coded = [name for name, entry in entries.items() if entry.coded]
    index: dict[str, Any] = {}
    start = 0
    for name in file_order({name: entry.dtype for name, entry in entries.items()}, coded):
        dtype, shape, data, _ = entries[name]
        index[name] = {"data_offsets": [start, start + len(data)], "dtype": dtype, "shape": list(shape)}
        start += len(data)
    payload = b"".join(entries[name].data for name in index)
    try:
        plan = canonical(_plan(artifact, coder)).decode()
        metadata = {"bitbook": str(VERSION), "crc32": "", "plan": plan}
        metadata["crc32"] = checksum(index, metadata, payload)
        whole = header_bytes(index, metadata) + payload
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 20, 0) : error.end + 20]
        raise PlanError(f"a name is not valid Unicode, at {around!r}; rename it") from None
    # Read back from the bytes themselves, which checks them and refuses what a reader would refuse.
    return whole, ledger_from_bytes(whole, max_elements=1 << 62)


class _Entry(NamedTuple):
    dtype: str
    shape: Shape
    data: bytes
    coded: bool


def _coded(data: bytes) -> _Entry:
    return _Entry("U8", (len(data),), data, True)


def _is_coded(tensor: Quantized | Tensor) -> bool:
    return isinstance(tensor, Quantized) and not isinstance(tensor.recipe, Float)


def _entry(name: str, tensor: Quantized | Tensor, coder: Coder) -> _Entry:
    if isinstance(tensor, Tensor):
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
            raise PlanError(f"{name}: {tensor.dtype}, {tensor.layout} cannot be stored; use strided {known}")
        values = tensor.detach().cpu().contiguous().reshape(-1)
        return _Entry(_NAMES[tensor.dtype], tuple(tensor.shape), values.view(torch.uint8).numpy().tobytes(), False)
    streams = list(tensor.streams())
    if isinstance(tensor.recipe, Float):  # bit patterns of 16 and 32 bits pack to what the float type itself is
        return _Entry(_NAMES[tensor.recipe.torch_dtype], tuple(tensor.shape), Fixed().encode(streams), False)
    if [stream.spec for stream in streams] != list(stream_specs(tensor.recipe, tensor.shape)):
        raise PlanError(f"{name}: {tensor.recipe!r} does not describe its side tensors as they are stored")
    return _coded(coder.encode(streams))


def _plan(artifact: Artifact, coder: Coder) -> dict[str, Any]:
    """The plan as JSON, without what is empty or the default."""
    quantized = {n: t for n, t in sorted(artifact.tensors.items()) if isinstance(t, Quantized) and _is_coded(t)}
    recipes, recipe_of = _numbered({name: t.recipe for name, t in quantized.items()}, recipe_to_json)
    activations, inputs = _numbered(
        {module: i.activation for module, i in sorted(artifact.inputs.items())}, lambda a: a.to_json()
    )
    named = next((name for name, known in CODERS.items() if known == coder), None)
    if named is None:
        raise PlanError(f"a file cannot name the coder {coder!r}; use one of {', '.join(CODERS)}")
    plan = {
        "activations": activations,
        "aliases": dict(artifact.aliases),
        "coder": "" if named == DEFAULT_CODER else named,
        "inputs": inputs,
        "recipes": recipes,
        "tensors": {name: [list(t.shape), recipe_of[name]] for name, t in quantized.items()},
    }
    return {key: value for key, value in plan.items() if value}


def _numbered(values: Mapping[str, _T], to_json: Callable[[_T], Any]) -> tuple[list[Any], dict[str, int]]:
    """The different values in the order of their first use, and each name's place among them."""
    numbers: dict[_T, int] = {}
    places = {name: numbers.setdefault(value, len(numbers)) for name, value in values.items()}
    return [to_json(value) for value in numbers], places
