"""Layers that compute from packed weights: one class for each operation, whatever the recipe.

A layer becomes one in place, so that whoever refers to it, its hooks and its name stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbook.artifact import QuantizedInput
from bitbook.errors import PlanError
from bitbook.runtime.integers import Integers
from bitbook.runtime.levels import Levels
from bitbook.runtime.packed import Packed
from bitbook.slot import SLOTS, detach, slots


class PackedLinear(nn.Linear):
    """`y = x · wᵀ + b` from packed weights; with a quantized input in integer arithmetic, where both allow it.

    `weight` decodes the whole tensor whenever it is asked for.  There is no gradient: an input that wants one is a
    `PlanError`.
    """

    packed: Packed
    integers: Integers | None

    @classmethod
    def take(cls, module: nn.Linear, packed: Packed, quantized_input: QuantizedInput | None) -> bool:
        """Make `module` one; whether it quantizes its input itself."""
        integers = None
        if quantized_input is not None and isinstance(packed, Levels):
            integers = Integers.of(packed, quantized_input)
        _become(module, cls)
        module.add_module("packed", packed)
        module.add_module("integers", integers)
        return integers is not None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """All weights as floats, decoded anew."""
        return decoded(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise PlanError(_NO_GRADIENT)
        own = self.__dict__  # at a quarter of what an attribute costs
        modules, bias = own["_modules"], own["_parameters"]["bias"]
        product = (modules["integers"] or modules["packed"]).linear
        if x.dim() == 2:
            return product(x, bias)
        y = product(x.reshape(-1, x.shape[-1]), bias)
        return y.reshape(*x.shape[:-1], y.shape[1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedEmbedding(nn.Embedding):
    """Rows of a packed matrix by their numbers; `weight` decodes the whole tensor whenever it is asked for."""

    packed: Packed

    @classmethod
    def take(cls, module: nn.Embedding, packed: Packed) -> None:
        """Make `module` one."""
        _become(module, cls)
        module.add_module("packed", packed)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """All rows as floats, decoded anew."""
        return decoded(self.packed)

    def forward(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1).long()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"index out of range in an embedding of {self.num_embeddings} rows")
        return self.packed.select(flat).reshape(*index.shape, self.embedding_dim).to(self.packed.dtype)


class Decoded(nn.Module):
    """The source of a slot (`slot.py`) that decodes a packed tensor in each forward: for all other operations."""

    packed: Packed

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self) -> Tensor:
        return decoded(self.packed)


CHILDREN = ("packed", "integers", SLOTS)
"""Where a layer that computes from packed tensors has these, and what else it needs for that."""


def packed_tensors(module: nn.Module) -> dict[str, Packed]:
    """What `module` computes from instead of parameters of its own, by their names."""
    if isinstance(module, PackedLinear | PackedEmbedding):
        return {"weight": module.packed}
    return {name: source.packed for name, source in slots(module).items() if isinstance(source, Decoded)}


def give_back(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
    """Put a parameter where `packed_tensors` has a tensor; the layer is what it was before."""
    if isinstance(module, PackedLinear | PackedEmbedding):
        for child in CHILDREN:
            module._modules.pop(child, None)
        _turn(module, nn.Linear if isinstance(module, PackedLinear) else nn.Embedding)
    else:
        detach(module, attribute, parameter)
    module._parameters[attribute] = parameter


def serves(module: nn.Module, attribute: str) -> bool:
    """Whether the operation has a packed class; exactly these layers, since subclasses may use weights otherwise."""
    if attribute != "weight":
        return False
    if type(module) is nn.Embedding:
        return module.max_norm is None  # which changes the weights
    return type(module) is nn.Linear


def decoded(packed: Packed) -> Tensor:
    """The whole tensor, in the type in which the model works."""
    return packed.decode().to(packed.dtype)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    del module._parameters["weight"]
    _turn(module, kind)


def _turn(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


_NO_GRADIENT = (
    "packed weights have no gradient, and the input of a packed layer wants one: call the model in torch.no_grad(), "
    "or load it with resident='dense' to train it"
)
