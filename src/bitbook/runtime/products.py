"""How products by the loops of native.c are called, and on which inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitbook.runtime.packing import threads_for

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Of an input `(batch, cols)` with a tensor, plus a bias `(rows,)`."""


def is_plain(x: Tensor) -> bool:
    """Whether compiled loops can read `x`: contiguous float32 on the CPU, not traced."""
    return x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and not torch.compiler.is_compiling()


def native_product(call: Any, structure: ctypes.Structure, kept: object, rows: int, size: int) -> Product:
    """The product by `call`, a loop of native.c, of plain inputs.

    structure: its argument; kept: the tensors that this points into; rows: of the tensor; size: multiplications for
    each input.  Raises `MemoryError` where the loop finds no room for what it prepares of the inputs.
    """
    reference = ctypes.byref(structure)

    def product(x: Tensor, bias: Tensor | None, _: Any = kept) -> Tensor:
        n = len(x)
        y = torch.empty(n, rows)
        pointer = None if bias is None else bias.data_ptr()
        if not call(reference, pointer, x.data_ptr(), n, y.data_ptr(), threads_for(n * size)):
            raise MemoryError(f"a product of {n} × {rows} finds no room for what it prepares of its input")
        return y

    return product
