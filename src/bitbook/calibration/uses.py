"""What a model's parameters are multiplied with, seen where torch's functions are called.

    with Uses(wanted, visit): model(batch)        F.linear(x, W) ──► visit("fc.weight", Columns(x))

A layer's class does not matter, so layers of one's own, tied weights and modules used twice need nothing.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float as F32
from jaxtyping import Float64 as F64
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitbook.calibration.calls import tensors_in
from bitbook.calibration.recurrent import CELLS, LAYERS, of_cell, of_layers

_MOST_PATCHES = 1 << 22  # numbers held at once; a convolution's patches are several times its inputs


class Columns(NamedTuple):
    """A use of a weight's matrix `(rows, cols)`, each row multiplied with the same vectors of `cols` inputs."""

    parts: Iterator[F32[Tensor, "groups places cols"]]
    """The vectors, some at a time; with groups, equal shares of the rows have inputs of their own."""
    share: int = 0
    """Which of `shares` equal parts of the rows is used."""
    shares: int = 1


class Rows(NamedTuple):
    """A use of a weight whose *first* axis is that of the inputs: an embedding, a transposed convolution, `x @ W`."""

    parts: Iterator[tuple[F64[Tensor, " rows"], int]]
    """The sum of each row's squared inputs over some places, and how many places."""
    function: str
    prior: float = 0.0
    """What each row's sum begins with."""


Use = Columns | Rows
Visit = Callable[[str, Use], None]


class Uses(TorchFunctionMode):
    """Calls `visit` with each use of each wanted parameter while it is entered.

    Args:
        wanted: `id` of a parameter → its name.
        visit: called with the name and the use, whose inputs are computed when they are asked for.

    `others` has the functions that used wanted parameters in a way that is not measured, by the parameter's name.
    """

    def __init__(self, wanted: Mapping[int, str], visit: Visit) -> None:
        super().__init__()
        self.wanted, self.visit = wanted, visit
        self.others: dict[str, str] = {}
        self.flipped: dict[int, tuple[Tensor, Tensor]] = {}  # transposes, held so that no id comes again, and of what

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and self.flipped:
            self._product_with_transposed(*args[-2:])
        touched = [name for tensor in tensors_in([args, kwargs]) if (name := self.wanted.get(id(tensor)))]
        seen: set[str] = set()
        if touched and func in _READERS:
            for weight, use in _READERS[func](*args, **kwargs):
                name = self.wanted.get(id(weight))
                if name is not None:
                    seen.add(name)
                    self.visit(name, use)
        result = func(*args, **kwargs)
        if (
            touched
            and args
            and _name(func) in _TRANSPOSES
            and args[0].dim() == 2
            and result.shape == args[0].shape[::-1]
        ):
            self.flipped[id(result)] = result, args[0]
            return result
        if touched and next(tensors_in(result), None) is not None:  # not where it is asked for its shape
            for name in touched:
                if name not in seen:
                    self.others.setdefault(name, _name(func))
        return result

    def _product_with_transposed(self, x: Any = None, other: Any = None) -> None:
        """`x @ Wᵀ` is `F.linear(x, W)`."""
        _, weight = self.flipped.get(id(other), (None, None))
        if weight is not None and isinstance(x, Tensor):
            self.visit(self.wanted[id(weight)], Columns(_rows(x)))


def _name(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


# -- readers: the arguments of a function → the weights among them, each with its use ----------
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[tuple[Tensor, Use]]:
    yield weight, Columns(_rows(input))


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Iterator[tuple[Tensor, Use]]:
    yield weight, Columns(_patches(input, weight, *args, **kwargs))


def _transposed(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Iterator[tuple[Tensor, Use]]:
    x = input.movedim(input.dim() - weight.dim() + 1, -1)  # the channels, of a batch or of one example
    yield weight, Rows(_squares(x), "a transposed convolution")


def _embedding(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Iterator[tuple[Tensor, Use]]:
    yield weight, Rows(_counts(input, len(weight)), "an embedding", prior=1.0)


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Iterator[tuple[Tensor, Use]]:
    if other.dim() == 2:
        yield other, Rows(_squares(input), "a product with it from the left")
    if input.dim() == 2:
        yield input, Columns(_rows(other.mT if other.dim() > 1 else other))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> Iterator[tuple[Tensor, Use]]:
    yield from _matmul(mat1, mat2)


def _attention(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Use]]:
    """In-projections, packed in one matrix or apart, and what the heads give the out-projection."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    inputs = [given["query"], given["key"], given["value"]]
    if given.get("use_separate_proj_weight"):
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), inputs, strict=True):
            yield given[name], Columns(_rows(x))
    elif inputs[0] is inputs[1] is inputs[2]:
        yield given["in_proj_weight"], Columns(_rows(inputs[0]))
    else:
        for share, x in enumerate(inputs):
            yield given["in_proj_weight"], Columns(_rows(x), share, 3)

    def heads() -> Iterator[Tensor]:
        weight = given["out_proj_weight"]
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        plain = {**given, "out_proj_weight": eye, "out_proj_bias": None, "need_weights": False}
        yield from _rows(F.multi_head_attention_forward(**plain)[0])

    yield given["out_proj_weight"], Columns(heads())


def _layers(function: Callable[..., Any], *args: Any) -> Iterator[tuple[Tensor, Use]]:
    for weight, x in of_layers(function, *args):
        yield weight, Columns(_rows(x))


def _cell(*args: Any) -> Iterator[tuple[Tensor, Use]]:
    for weight, x in of_cell(*args):
        yield weight, Columns(_rows(x))


_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, torch.addmm, Tensor.addmm)
_TRANSPOSES = ("T", "mT", "t", "transpose")
_READERS: dict[Any, Callable[..., Iterator[tuple[Tensor, Use]]]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
    **dict.fromkeys((F.embedding, F.embedding_bag), _embedding),
    **dict.fromkeys(_PRODUCTS[:5], _matmul),
    **dict.fromkeys(_PRODUCTS[5:], _addmm),
    F.multi_head_attention_forward: _attention,
    **{function: functools.partial(_layers, function) for function in LAYERS},
    **dict.fromkeys(CELLS, _cell),
}


# -- inputs, some at a time --------------------------------------------------------------------
def _rows(x: Tensor) -> Iterator[F32[Tensor, "1 places cols"]]:
    rows = x.detach().reshape(-1, x.shape[-1])
    for part in rows.split(max(_MOST_PATCHES // max(x.shape[-1], 1), 1)):
        yield part.float()[None]


def _squares(x: Tensor) -> Iterator[tuple[F64[Tensor, " rows"], int]]:
    for (part,) in _rows(x):
        yield part.double().square().sum(0), len(part)


def _counts(indices: Tensor, rows: int) -> Iterator[tuple[F64[Tensor, " rows"], int]]:
    yield indices.flatten().bincount(minlength=rows).double(), indices.numel()


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
