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
        return self.packed.decode()

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
        return self.packed.decode()

    def forward(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1).long()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"index out of range in an embedding of {self.num_embeddings} rows")
        return self.packed.select(flat).reshape(*index.shape, self.embedding_dim)


class Decoded(nn.Module):
    """The source of a slot (`slot.py`) that decodes a packed tensor in each forward: for all other operations."""

    packed: Packed

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self) -> Tensor:
        return self.packed.decode()


def serves(module: nn.Module, attribute: str) -> bool:
    """Whether the operation has a packed class; exactly these layers, since subclasses may use weights otherwise."""
    if attribute != "weight":
        return False
    if type(module) is nn.Embedding:
        return module.max_norm is None  # which changes the weights
    return type(module) is nn.Linear


def _become(module: Any, kind: type[nn.Module]) -> None:
    del module._parameters["weight"]
    module.__class__ = kind


_NO_GRADIENT = (
    "packed weights have no gradient, and the input of a packed layer wants one: call the model in torch.no_grad(), "
    "or load it with resident='dense' to train it"
)
