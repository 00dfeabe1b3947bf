"""Files into models that stay packed, and the report of how each tensor is held.

file ──a tensor at a time──► Quantized ──► Packed ──► PackedLinear · PackedEmbedding · a slot that decodes
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitbook.apply import Place, match, quantize_inputs
from bitbook.artifact import Artifact, QuantizedInput
from bitbook.artifact.read import read_each
from bitbook.errors import PlanError
from bitbook.quantizer import Quantized
from bitbook.runtime.forms import pack_tensor
from bitbook.runtime.integers import Integers
from bitbook.runtime.layers import Decoded, PackedEmbedding, PackedLinear, decoded, give_back, packed_tensors, serves
from bitbook.runtime.packed import Packed
from bitbook.slot import attach


class Held(NamedTuple):
    """How one tensor is held in memory."""

    name: str
    how: str
    why: str
    bytes: int
    float_bytes: int


@dataclass(frozen=True)
class Residence:
    """How every tensor of a model is held, and why."""

    tensors: tuple[Held, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(held.bytes for held in self.tensors)

    @property
    def float_bytes(self) -> int:
        """What they would take as the model had them before."""
        return sum(held.float_bytes for held in self.tensors)

    def __str__(self) -> str:
        rows = [
            f"{held.name}: {held.how}, {held.bytes:,} of {held.float_bytes:,} bytes; {held.why}"
            for held in self.tensors
        ]
        return "\n".join([*rows, f"in all {self.bytes:,} of {self.float_bytes:,} bytes"])


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Read a file into `model` and keep it packed; errors as for `bitbook.load`.

    No more than one tensor is unpacked at a time on each of torch's threads.
    """
    contents = read_each(path, hold, torch.get_num_threads())
    return _place(contents.tensors, contents.inputs, contents.aliases, model)


def restore_packed(artifact: Artifact, model: nn.Module) -> nn.Module:
    """`restore`, of an artifact in memory, whose tensors stay packed; errors as there."""
    held = {name: hold(t) if isinstance(t, Quantized) else t for name, t in artifact.tensors.items()}
    return _place(held, artifact.inputs, artifact.aliases, model)


@torch.no_grad()
def decode_(model: nn.Module) -> nn.Module:
    """Make all packed tensors of `model` parameters again, in place; what is tied is one parameter.

    Inputs that were rounded for integer arithmetic no longer are.  Returns the model.
    """
    parameters: dict[Packed, nn.Parameter] = {}
    for module in list(model.modules()):
        for attribute, packed in packed_tensors(module).items():
            if packed not in parameters:
                parameters[packed] = nn.Parameter(decoded(packed), requires_grad=False)
            give_back(module, attribute, parameters[packed])
    model.__dict__.pop(_RESIDENCE, None)
    return model


def set_residence(model: nn.Module, tensors: Iterable[Held]) -> None:
    """What `residence` is to report."""
    model.__dict__[_RESIDENCE] = Residence(tuple(tensors))


def residence(model: nn.Module) -> Residence:
    """How each tensor of a model that was loaded packed is held; raises `PlanError` for any other model."""
    found = model.__dict__.get(_RESIDENCE)
    if not isinstance(found, Residence):
        raise PlanError("the model was not loaded packed; call bitbook.load(path, model, resident='packed')")
    return found


_RESIDENCE = "_bitbook_residence"


class Unpacked(NamedTuple):
    """A quantized tensor that is better off as floats, and why."""

    values: Tensor
    why: str

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


_Value = Packed | Unpacked | Tensor


@torch.no_grad()
def hold(quantized: Quantized) -> Packed | Unpacked:
    """The tensor as it is best held: packed, unless it is a vector or would not be smaller."""
    if len(quantized.shape) < 2:
        return Unpacked(quantized.decode(), "a vector is too small to be worth decoding in each call")
    packed = pack_tensor(quantized)
    if packed.nbytes >= 4 * packed.rows * packed.cols:
        return Unpacked(quantized.decode(), f"packed it would take {packed.nbytes:,} bytes")
    return packed


def _equal(a: _Value, b: _Value) -> bool:
    return torch.equal(
        *(t.decode() if isinstance(t, Packed) else t.values if isinstance(t, Unpacked) else t for t in (a, b))
    )


@torch.no_grad()
def _place(
    tensors: Mapping[str, _Value], inputs: Mapping[str, QuantizedInput], aliases: Mapping[str, str], model: nn.Module
) -> nn.Module:
    stored = {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}
    places = match(stored, inputs, model, _equal)
    left = dict(inputs)
    held: list[Held] = []
    for name, value in stored.items():
        place, old = places[name]
        float_bytes = 0 if name in aliases else old.nbytes
        if isinstance(value, Packed) and isinstance(old, nn.Parameter):
            value.dtype = old.dtype
            how, why = put(place, value.to(old.device), left)
            held.append(Held(name, how, why, 0 if name in aliases else value.nbytes, float_bytes))
            continue
        if isinstance(value, Packed):
            value = Unpacked(value.decode(), "a buffer, which the model may change")
        old.copy_(value.values if isinstance(value, Unpacked) else value)
        why = value.why if isinstance(value, Unpacked) else "as it is in the file"
        held.append(Held(name, "dense", why, float_bytes, float_bytes))
    quantize_inputs(left, model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_residence(model, held)
    return model


def put(place: Place, packed: Packed, inputs: dict[str, QuantizedInput]) -> tuple[str, str]:
    """Let the operation that a parameter serves run from packed codes; how, and why so.

    inputs: by the names of modules; one that the operation rounds itself is taken out.
    """
    module, form = place.module, f"{type(packed).__name__} of {packed.recipe!r}"
    if not serves(module, place.attribute):
        attach(module, place.attribute, Decoded(packed))
        return f"packed, {form}", f"decoded in each call: {type(module).__name__} has no packed form"
    if isinstance(module, nn.Embedding):
        PackedEmbedding.take(module, packed)
        return f"packed, {form}", "rows are decoded as they are asked for"
    assert isinstance(module, nn.Linear)
    name = place.name.rpartition(".")[0]
    if PackedLinear.take(module, packed, inputs.get(name)):
        del inputs[name]
        return f"packed, {form}", Integers.how
    return f"packed, {form}", packed.how
