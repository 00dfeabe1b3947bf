"""The weight slot: a tensor attribute of any module, read from a source module.

    attach(fc1, "weight", source)   fc1.weight ──► source()      (any layer type, one class each)
    detach(fc1, "weight")           fc1.weight is a Parameter again

The attribute becomes a property on a shared subclass of the module's class, so `isinstance`, `.weight`,
deepcopy, pickle, `.half()`, compile, export and DDP keep working.  Within one `forward` of the module its
source runs once, however often the attribute is read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bitbook.errors import PlanError

SLOTS = "slots"
"""Name of the child module that holds the sources: `fc1.slots.weight`."""


class _Slotted(nn.Module):
    """Mixed in before the module's own class; opens a cache for the time of one forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_slot_values"] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_slot_values"] = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass is made at run time, so pickle and deepcopy rebuild it from its parts.
        base, names = type(self)._slot_key  # type: ignore[attr-defined]
        return _rebuild, (base, names), dict(self.__getstate__())  # some modules drop what cannot be pickled


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _slotted(base, names)
    return cls.__new__(cls)


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor:
        values = self.__dict__.get("_slot_values")
        if values is None:
            return self._modules[SLOTS]._modules[name]()
        if name not in values:
            values[name] = self._modules[SLOTS]._modules[name]()
        return values[name]

    return property(read, doc=f"The {name}, as its source gives it.")


@functools.cache
def _slotted(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _reader(name) for name in names}
    members["_slot_key"] = (base, names)
    members["__doc__"] = base.__doc__
    if issubclass(base, nn.RNNBase):
        # Recurrent layers keep a second list of their weights, filled once at construction.
        members["_flat_weights"] = property(
            lambda self: [getattr(self, n, None) for n in self._flat_weights_names],
            lambda self, _: None,
        )
    return type(base.__name__, (_Slotted, base), members)


def _key(module: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The class that a module had before anything was attached to it, and what is attached."""
    return getattr(type(module), "_slot_key", (type(module), ()))


def _become(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def slots(module: nn.Module) -> dict[str, nn.Module]:
    """The sources attached to `module`, by attribute name."""
    return dict(getattr(module, SLOTS).named_children()) if isinstance(module, _Slotted) else {}


def attach(module: nn.Module, name: str, source: nn.Module) -> None:
    """Let `module.<name>` be read from `source()` instead of a parameter or buffer of its own.

    Raises `PlanError` where `name` is no parameter or buffer of the module, or already has a source.
    """
    if name in slots(module):
        raise PlanError(f"{type(module).__name__}.{name} already has a source; detach it first")
    if name not in module._parameters and name not in module._buffers:
        raise PlanError(f"{type(module).__name__} has no parameter or buffer {name!r} of its own")
    if isinstance(module, torch.jit.ScriptModule):
        raise PlanError(f"{type(module).__name__} is scripted; quantize the original module")
    base, names = _key(module)
    if not names and SLOTS in module._modules:
        raise PlanError(f"{type(module).__name__} has a child module named {SLOTS!r}; rename it")
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    if not names:
        module.add_module(SLOTS, nn.Module())  # a ModuleDict would refuse names such as "values"
        module._slot_values = None  # type: ignore[assignment]
    getattr(module, SLOTS).add_module(name, source)
    _become(module, _slotted(base, tuple(sorted({*names, name}))))


def detach(module: nn.Module, name: str, value: Tensor | None = None) -> nn.Module:
    """Give `module.<name>` back as a parameter holding `value` (by default what the source gives now).

    Returns the source; raises `PlanError` where there is none.
    """
    if name not in slots(module):
        raise PlanError(f"{type(module).__name__}.{name} has no source to detach")
    base, names = _key(module)
    source = slots(module)[name]
    with torch.no_grad():
        kept = (source() if value is None else value).detach().clone()
    del getattr(module, SLOTS)._modules[name]
    left = tuple(n for n in names if n != name)
    if left:
        _become(module, _slotted(base, left))
    else:
        del module._modules[SLOTS]
        del module._slot_values
        _become(module, base)
    module.register_parameter(name, nn.Parameter(kept))
    if isinstance(module, nn.RNNBase) and not left:
        module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
    return source
