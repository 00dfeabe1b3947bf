"""How products by compiled loops are made, kept and called, and on which inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float as F32
from torch import Tensor, nn
from torch.compiler import is_compiling

from bitbook.runtime import native

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Of an input `(batch, cols)` with a tensor, plus a bias `(rows,)`."""

_FLOAT32 = torch.float32
_SMALL = 1 << 18  # multiplications, done before another thread has begun


def is_plain(x: Tensor) -> bool:
    """Whether compiled loops can read `x`: contiguous float32 on the CPU, not traced."""
    return x.dtype is _FLOAT32 and x.is_cpu and x.is_contiguous() and not is_compiling()


class Prepared(nn.Module):
    """What has a product that points into its tensors: made for the first plain input, anew once they have moved."""

    def __init__(self) -> None:
        super().__init__()
        self._prepared: Any = None

    def linear(self, x: F32[Tensor, "batch cols"], bias: F32[Tensor, " rows"] | None) -> F32[Tensor, "batch rows"]:
        """`x · wᵀ + bias`."""
        if not is_plain(x):
            return self._by_torch(x, bias)
        if self._prepared is None:
            self._prepared = self._product() or self._by_torch
        return self._prepared(x, bias)

    def _product(self) -> Product | None:
        """The product by compiled loops; None where there are none for what this is, or where it lies."""
        return None

    def _by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The reference, on any device."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # addresses of memory

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._prepared = None
        return super()._apply(fn, recurse)


def native_product(call: Any, structure: ctypes.Structure, kept: object, rows: int, size: int) -> Product:
    """The product by `call`, a loop of native.c, of plain inputs.

    structure: its argument; kept: the tensors that this points into; rows: of the tensor; size: multiplications for
    each input.  Raises `MemoryError` where the loop finds no room for what it prepares of the inputs.
    """
    address, pack, empty = ctypes.addressof(structure), native.pack_call, torch.empty

    def product(x: Tensor, bias: Tensor | None, _: Any = (structure, kept)) -> Tensor:
        n = x.shape[0]  # len() takes three times as long
        if bias is None:
            added = 0
        elif bias.dtype is _FLOAT32 and bias.is_cpu and bias.is_contiguous():
            added = bias.data_ptr()
        else:
            return product(x, None).add_(bias)
        y = empty(n, rows)
        threads = 1 if n * size < _SMALL else min(torch.get_num_threads(), 1 + n * size // _SMALL)
        if not call(address, pack(added, x.data_ptr(), n, y.data_ptr(), threads)):
            raise MemoryError(f"a product of {n} × {rows} finds no room for what it prepares of its input")
        return y

    return product
