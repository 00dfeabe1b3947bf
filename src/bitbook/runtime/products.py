"""How products by the loops of native.c are called, and on which inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bitbook.runtime import native

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Of an input `(batch, cols)` with a tensor, plus a bias `(rows,)`."""

_FLOAT32 = torch.float32
_SMALL = 1 << 18  # multiplications, done before another thread has begun


def is_plain(x: Tensor) -> bool:
    """Whether compiled loops can read `x`: contiguous float32 on the CPU, not traced."""
    return x.dtype is _FLOAT32 and x.is_cpu and x.is_contiguous() and not is_compiling()


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
