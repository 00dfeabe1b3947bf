"""What a file holds, in memory: tensors, how inputs are quantized, and which names are tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bitbook.errors import ModelMismatch, PlanError
from bitbook.plan import Activation
from bitbook.quantizer import Child, Quantized

METADATA = "__metadata__"
"""The header's name for what is no tensor, as safetensors has it."""

INPUTS = "__inputs__"
"""The entry that holds the side tensors of all inputs."""


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """How the input of one module is quantized, with the side tensors that the file stores for it.

    Raises `PlanError` unless `side` is what the activation needs: empty for the range "batch", otherwise
    each of `input_children`.
    """

    activation: Activation
    side: Mapping[str, Quantized] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = input_children(self.activation)
        given = {name: Child(q.recipe, tuple(q.shape)) for name, q in self.side.items()}
        if given != needed:
            raise PlanError(f"{self.activation!r} needs the side tensors {needed}, but got {given}")


def input_children(activation: Activation) -> dict[str, Child]:
    """The stored side tensors of an activation: one value each; none where each batch gives the range."""
    return {} if activation.range == "batch" else dict(activation.recipe.children((1, 1)))


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compressed model.

    Attributes:
        tensors: by their names in the model's state dict; a plain tensor is dense, stored as it is.
        inputs: by module name.
        aliases: tied name → the name in `tensors` that stands for both.

    Raises `PlanError` for a name that the format reserves, and for an alias that hides a tensor or names
    none.
    """

    tensors: Mapping[str, Quantized | Tensor]
    inputs: Mapping[str, QuantizedInput] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (METADATA, INPUTS):
            if name in self.tensors or name in self.aliases:
                raise PlanError(f"the name {name!r} is reserved by the file format; rename the tensor")
        for alias, name in self.aliases.items():
            if alias in self.tensors or name not in self.tensors:
                raise PlanError(f"the alias {alias!r} of {name!r} must be a new name for a stored tensor")

    def decode(self, name: str) -> Tensor:
        """One tensor: float32 where it is quantized, as stored where dense; raises `ModelMismatch`."""
        tensor = self.tensors.get(self.aliases.get(name, name))
        if tensor is None:
            raise ModelMismatch(f"there is no tensor {name!r}; there are {', '.join(self.tensors) or 'none'}")
        return tensor.decode() if isinstance(tensor, Quantized) else tensor

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, aliases included; a tied name gets the same tensor object."""
        state = {name: self.decode(name) for name in self.tensors}
        return state | {alias: state[name] for alias, name in self.aliases.items()}
