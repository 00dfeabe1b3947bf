"""Calibration inputs, in whatever they come, as the arguments of a model's calls.

    tensors, (x, y), {"input_ids": …, "labels": …}, DataLoader ──► calls ──► model(*args, **kwargs)

One batch is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bitbook.errors import PlanError

CALIBRATION_BATCH = 256
KEPT = 1 << 28
"""Bytes of an iterator's batches that are kept, where they are needed several times."""
LABELS = "labels"
"""The key of a batch that is a dict under which the model is not given anything."""


class Call(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls(batches: Tensor | Iterable[Any], size: int = CALIBRATION_BATCH) -> Iterator[Call]:
    """What the model is to be called with, batch by batch.

    - A tensor holds examples along its first axis.  Tensors that follow each other are regrouped into calls of `size`
      examples, so that a result does not depend on how they were batched.
    - A tuple or list is `(inputs, labels, …)`: the first element is passed, as it is, the others are not.
    - A dict is passed by name, without `"labels"`.

    Raises `PlanError` for anything else.
    """
    held: list[Tensor] = []
    for batch in _iterable(batches):
        if not isinstance(batch, Tensor):
            yield from _whole(held)
            held = []
            yield _call(batch)
            continue
        if not batch.dim():
            raise PlanError("a batch is a tensor without axes; its first axis must be that of the examples")
        if held and (held[0].shape[1:], held[0].dtype) != (batch.shape[1:], batch.dtype):
            yield from _whole(held)  # sequences of other lengths
            held = []
        held.append(batch)
        while sum(map(len, held)) >= size:
            joined = held[0] if len(held) == 1 else torch.cat(held)
            yield Call((joined[:size],), {})
            held = [joined[size:]]
    yield from _whole(held)


def repeatable(batches: Tensor | Iterable[Any]) -> Iterable[Any]:
    """The same batches as something that can be gone through several times.

    Lists, data loaders and the like stay what they are.  An iterator, which is used up after one pass, is kept if its
    tensors hold at most `KEPT` bytes; otherwise `PlanError` is raised.
    """
    batches = _iterable(batches)
    if not isinstance(batches, Iterator):
        return batches
    kept, size = [], 0
    for batch in batches:
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(batch))
        if size > KEPT:
            raise PlanError(
                f"calibration goes through its inputs several times, and a {type(batches).__name__} can be gone "
                f"through once; it gave more than the {KEPT >> 20} MiB that are kept. Pass a DataLoader, a list, or an "
                "object whose __iter__ begins anew"
            )
        kept.append(batch)
    return kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model evaluates, without fused attention; then all is as it was before."""
    modes = {module: module.training for module in model.modules()}
    # Fused, a layer of attention calls none of the functions and modules that are looked at.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _iterable(batches: Tensor | Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Tensor):
        return [batches]
    if isinstance(batches, Mapping | str) or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise PlanError(f"calibration inputs are a {type(batches).__name__}; pass a list of batches, or a DataLoader")
    return batches


def _whole(held: list[Tensor]) -> Iterator[Call]:
    if sum(map(len, held)):
        yield Call((torch.cat(held),), {})


def _call(batch: Any) -> Call:
    if isinstance(batch, Mapping):
        return Call((), {name: value for name, value in batch.items() if name != LABELS})
    if isinstance(batch, PackedSequence):  # a tuple, too
        return Call((batch,), {})
    if isinstance(batch, tuple | list) and batch:
        first = batch[0]
        return _call(first) if isinstance(first, Mapping) else Call((first,), {})
    raise PlanError(f"a batch is {type(batch).__name__}; use a tensor, (inputs, labels), or a dict of arguments")
