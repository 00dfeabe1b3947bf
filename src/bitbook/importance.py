"""Second moments of what weights are multiplied with: H = E[x xᵀ], measured on calibration inputs.

Whatever calls `torch.nn.functional.linear` or a convolution with a parameter of the model is seen, be it a layer or a
function of one's own: x are the inputs as the weight's matrix `(rows, cols)` sees them, for convolutions the patches
under the kernel, for groups each group's.  Embeddings, recurrent layers and attention's in-projection are not seen.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import PlanError
from bitbook.inputs import CALIBRATION_BATCH, regroup

_MOST_PATCHES = 1 << 22  # numbers held at once; a convolution's patches are several times its inputs
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def second_moments(
    model: nn.Module,
    batches: Iterable[Tensor],
    names: Collection[str] | None = None,
    *,
    first_use: bool = False,
) -> dict[str, F64[Tensor, "groups cols cols"]]:
    """Run `batches` of inputs through `model` in evaluation mode, and measure H of each weight.

    A mean over all examples (and places, of a convolution); a weight used or tied several times counts every use.  By
    default every weight that is reached, under the first of its names, in the order of their use; with `names`, those.
    With `first_use`, each forward ends where the first of them was used.

    Raises `PlanError` where there are no inputs, a name is no parameter, or no input reaches it.
    """
    wanted = parameters_by_name(model, names)
    found: dict[str, F64[Tensor, "groups cols cols"]] = {}
    counts: dict[str, int] = {}

    def add(name: str, weight: Tensor, patches: Iterator[F32[Tensor, "groups places cols"]]) -> None:
        for x in patches:
            if name not in found:
                size = x.shape[2]
                found[name] = torch.zeros(len(x), size, size, dtype=torch.float64, device=x.device)
                counts[name] = 0
            found[name] += (x.mT @ x).double()
            counts[name] += x.shape[1]
        if first_use:
            raise Enough

    if not run(model, batches, wanted, add):
        raise PlanError("there are no calibration inputs; pass at least one batch of the model's inputs")
    if names is not None:
        for name in names:
            if name not in found:
                kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
                raise PlanError(
                    f"{name}: no calibration input reaches it through a linear layer or a convolution (it is a tensor "
                    f"of {tuple(model.get_parameter(name).shape)} in {kind}); encode it without feedback"
                )
    for name, moments in found.items():
        if not moments.isfinite().all():
            raise PlanError(f"{name}: its inputs hold NaN or infinity on the calibration inputs")
    return {name: moments / max(counts[name], 1) for name, moments in found.items()}


def diagonal(moments: Tensor, shape: Shape) -> Tensor:
    """H's diagonal as weights of squared errors, of a weight's shape and with a mean of one: an `importance`."""
    weights = moments.double().reshape(-1, *moments.shape[-2:]).diagonal(dim1=1, dim2=2)
    rows, cols = matrix_shape(shape)
    if weights.shape[1] != cols or rows % len(weights):
        raise PlanError(f"second moments of {tuple(moments.shape)} do not fit a weight of shape {shape}")
    mean = weights.mean()
    weights = (weights / mean if mean > 0 else torch.ones_like(weights)).float()
    return weights[:, None].expand(-1, rows // len(weights), -1).reshape(shape)


def parameters_by_name(model: nn.Module, names: Collection[str] | None) -> dict[int, str]:
    """`id` of each wanted parameter → the name it goes by."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in names or ():
        if name not in own:
            raise PlanError(f"the model has no parameter {name!r} of its own; it has {', '.join(list(own)[:8])}, …")
    found: dict[int, str] = {}
    for name in own if names is None else names:
        found.setdefault(id(own[name]), name)
    return found


class Enough(Exception):
    """Raised by a visitor that needs no more of this forward."""


@torch.no_grad()
def run(
    model: nn.Module,
    batches: Iterable[Tensor],
    wanted: Mapping[int, str],
    visit: Callable[[str, Tensor, Iterator[F32[Tensor, "groups places cols"]]], None],
) -> int:
    """Call `visit` with the inputs of each use of each wanted weight; returns the number of forwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    forwards = 0
    try:
        for batch in regroup(batches, CALIBRATION_BATCH):
            forwards += 1
            with _Uses(wanted, visit), contextlib.suppress(Enough):
                model(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    return forwards


class _Uses(TorchFunctionMode):
    """Sees every call of a function of torch while it is entered."""

    def __init__(self, wanted: Mapping[int, str], visit: Callable[[str, Tensor, Iterator[Tensor]], None]) -> None:
        super().__init__()
        self.wanted, self.visit = wanted, visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self.wanted.get(id(weight))
            if name is not None:
                x = args[0] if args else kwargs["input"]
                patches = _rows(x) if func is F.linear else _patches(x, weight, *args[3:], **_options(kwargs))
                self.visit(name, weight, patches)
        return func(*args, **kwargs)


def _options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}


def _rows(x: Tensor) -> Iterator[F32[Tensor, "1 places cols"]]:
    rows = x.detach().float().reshape(-1, x.shape[-1])
    for part in rows.split(max(_MOST_PATCHES // x.shape[-1], 1)):
        yield part[None]


def _patches(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Iterator[F32[Tensor, "groups places cols"]]:
    """What the kernel of a convolution lies on, place by place: columns in the order of the flattened weight."""
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    x = x.detach().float()
    if x.dim() == axes + 1:
        x = x[None]
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        margins = [(total // 2, total - total // 2) for total in totals]
    else:
        margins = [(p, p) for p in _each(0 if padding == "valid" else padding, axes)]
    x = F.pad(x, [p for margin in reversed(margins) for p in margin])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    channels = x.shape[1] // groups
    per_example = x.shape[1] * math.prod(kernel) * math.prod(sizes)
    for part in x.split(max(_MOST_PATCHES // max(per_example, 1), 1)):
        shifted = []
        for offset in itertools.product(*map(range, kernel)):
            places = [
                slice(o * d, o * d + (n - 1) * s + 1, s)
                for o, d, n, s in zip(offset, dilation, sizes, stride, strict=True)
            ]
            shifted.append(part[(slice(None), slice(None), *places)].reshape(len(part), groups, channels, -1))
        patches = torch.stack(shifted, 3)  # (examples, groups, channels, kernel, places)
        patches = patches.reshape(len(part), groups, channels * len(shifted), -1)
        yield patches.permute(1, 0, 3, 2).reshape(groups, -1, channels * len(shifted))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """An option of a convolution for each axis."""
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    return tuple(int(v) for v in (values * axes if len(values) == 1 else values))
