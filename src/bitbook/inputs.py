"""Activation quantization: a module's input rounded to a few levels before the module sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitbook.calibration.calls import calls, evaluating
from bitbook.errors import PlanError
from bitbook.plan import Activation
from bitbook.quantizer import FitOptions, Quantized, quantize

CHILD = "input_quantizer"
"""Name under which an `InputQuantizer` sits in the module whose input it quantizes."""

MOMENTUM = 0.1  # of running ranges, as in batch normalisation
CALIBRATION_EXAMPLES = 1024
"""How many examples give a range where the caller does not choose."""


class InputQuantizer(nn.Module):
    """Quantizes the first argument of a module's forward, with the range rule of its `Activation`.

    Buffers `lo`, `hi`, `mean_abs` hold the range where it is not taken from each batch.
    """

    lo: Tensor
    hi: Tensor
    mean_abs: Tensor
    seen: Tensor

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.options = FitOptions(range=activation.rule)
        self.collecting = False
        self.stored: dict[str, Quantized] = {}
        for name in ("lo", "hi", "mean_abs"):
            self.register_buffer(name, torch.zeros(1, 1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the levels of its range; the gradient passes straight through."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise PlanError(f"an input of {what} is not a floating-point tensor; leave its module out of the plan")
        if self.collecting:
            self._collect(x)
            return x
        if x.dim() == 2 and x.dtype == torch.float32:  # most inputs, without what the reshapes add to the graph
            return self.activation.recipe.surrogate(x, self._side(x.detach()), self.options)
        flat = x.float().reshape(len(x) if x.dim() > 1 else 1, -1)
        side = self._side(flat.detach())
        return self.activation.recipe.surrogate(flat, side, self.options).reshape(x.shape).to(x.dtype)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The forward pre-hook that puts this in front of `module`."""
        if not args:
            raise PlanError(f"the input of {type(module).__name__} is quantized; pass it by position, not by name")
        return (self(args[0]), *args[1:])

    def freeze(self) -> dict[str, Quantized]:
        """The side tensors that the file stores: none where the range comes from each batch."""
        if self.activation.range == "batch":
            return {}
        if not self.stored:
            self._check_seen()
            recipe = self.activation.recipe
            side = self._from(self.lo, self.hi, self.mean_abs)
            children = recipe.children((1, 1))
            options = recipe.child_options(self.options)
            return {name: quantize(child.recipe, side[name], options=options) for name, child in children.items()}
        return self.stored

    def extra_repr(self) -> str:
        return f"{self.activation.recipe!r}, range={self.activation.range}"

    def _side(self, x: Tensor) -> Mapping[str, Tensor]:
        if self.activation.range == "batch":
            return self.activation.recipe.refresh(x, {}, self.options)
        if self.activation.range == "running" and self.training and not self.stored:
            self._follow(x)
        return {name: quantized.decode() for name, quantized in self.freeze().items()}

    def _from(self, lo: Tensor, hi: Tensor, mean_abs: Tensor) -> dict[str, Tensor]:
        recipe = cast(Any, self.activation.recipe)  # Activation has checked that it has from_range
        return recipe.from_range(lo.float(), hi.float(), mean_abs.float(), self.options)

    def _follow(self, x: Tensor) -> None:
        lo, hi = torch.aminmax(x)
        step = MOMENTUM if self.seen else 1.0
        for buffer, new in ((self.lo, lo), (self.hi, hi), (self.mean_abs, x.abs().mean())):
            buffer.lerp_(new.double(), step)
        self.seen += 1

    def _collect(self, x: Tensor) -> None:
        lo, hi = (extreme.double() for extreme in torch.aminmax(x))
        first = not bool(self.seen)
        self.lo.copy_(lo if first else torch.minimum(self.lo, lo))
        self.hi.copy_(hi if first else torch.maximum(self.hi, hi))
        self.mean_abs += (x.double().abs().sum() - self.mean_abs * x.numel()) / (self.seen + x.numel())
        self.seen += x.numel()

    def _check_seen(self) -> None:
        if not self.seen:
            how = "train the model first" if self.activation.range == "running" else "call bitbook.calibrate first"
            raise PlanError(f"the input range of {self.activation.recipe!r} is not known yet; {how}")


def put_before(module: nn.Module, quantizer: InputQuantizer) -> None:
    """Quantize the first argument of `module`'s forward; raises `PlanError` for a container or a second one."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise PlanError(f"{type(module).__name__} is a container; name the modules inside it")
    if CHILD in module._modules:
        raise PlanError(f"the input of {type(module).__name__} is quantized already")
    module.add_module(CHILD, quantizer)
    module.register_forward_pre_hook(quantizer.hook)


def take_away(module: nn.Module) -> None:
    """Undo `put_before`; does nothing where no input is quantized."""
    quantizer = module._modules.pop(CHILD, None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if quantizer is not None and getattr(hook, "__self__", None) is quantizer:
            del module._forward_pre_hooks[key]


def calibrate(model: nn.Module, batches: Tensor | Iterable[Any]) -> None:
    """Measure the ranges of all calibrated inputs of `model` on `batches` of its input, in any form that `calls` takes.

    Tensors are regrouped into batches of a fixed size first, so the result does not depend on theirs.
    Raises `PlanError` where the model has no calibrated input or there are no data.
    """
    found = [m for m in model.modules() if isinstance(m, InputQuantizer) and m.activation.range == "calibrated"]
    if not found:
        raise PlanError("the model has no calibrated input; plan one with Activation(recipe, range='calibrated')")
    for quantizer in found:
        quantizer.seen.zero_()
        quantizer.mean_abs.zero_()
        quantizer.collecting = True
    try:
        with torch.no_grad(), evaluating(model):
            for args, kwargs in calls(batches):
                model(*args, **kwargs)
    finally:
        for quantizer in found:
            quantizer.collecting = False
    for quantizer in found:
        quantizer._check_seen()
