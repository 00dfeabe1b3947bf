"""A device that is not there: its tensors say that they are elsewhere, and compute on the CPU.

    there(w) ──► Elsewhere ──every operation──► on the CPU, elsewhere again      with a plain tensor: RuntimeError

So code that mixes devices fails as it would on a GPU.  `meta` stands for the other device, since torch runs its
gradients on the CPU; scalars mix freely, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_TENSOR = torch.tensor


class Elsewhere(Tensor):
    """A tensor on the pretended device, and where it really is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inner = real
        return made

    def tolist(self) -> Any:
        """Numbers come to the CPU wherever they were; torch refuses this to subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """Makes what is asked for on the pretended device."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    away = any(isinstance(t, Elsewhere) for t in given)
    asked = kwargs.get("device")
    moves = "_to_copy" in str(func) or "copy_" in str(func)
    if away and not moves:
        for t in given:
            if not isinstance(t, Elsewhere) and t.dim():
                raise RuntimeError(f"{func}: tensors of {tuple(t.shape)} on the CPU and elsewhere meet")
    there = away if asked is None else torch.device(asked) == DEVICE
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    if asked is not None and torch.device(asked) == DEVICE:
        kwargs["device"] = torch.device("cpu")
    real_args, real_kwargs = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    out = func(*real_args, **real_kwargs)
    if func is torch.ops.aten._local_scalar_dense.default:
        return out
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable:  # in place
        return args[0]
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, Tensor) and there else t, out)


@contextmanager
def device() -> Iterator[torch.device]:
    """The pretended device, on which tensors can be made and moved inside."""

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        made = _TENSOR(data, dtype=dtype)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # which torch runs where no mode sees it
    try:
        with _Factories():
            yield DEVICE
    finally:
        torch.tensor = _TENSOR
