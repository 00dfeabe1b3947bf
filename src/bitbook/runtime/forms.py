"""Which kernels serve which operation on which quantizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from bitbook.quantizer import Quantized, Quantizer
from bitbook.runtime.books import Rows, Vectors
from bitbook.runtime.levels import SCALARS, Levels
from bitbook.runtime.packed import Dense, Packed, Streams
from bitbook.runtime.turned import Turned
from bitbook.scalar.leaves import Float
from bitbook.transforms.permuted import Permuted
from bitbook.transforms.rotated import Rotated
from bitbook.vector.codebook import Codebook

Operation = Literal["linear", "embedding"]
"""A product with the tensor as a matrix; some of its rows."""

Form = Callable[[Quantized], Packed | None]
"""Packs a tensor for its kernels; None where they do not serve its blocks or codes."""

_OF: Mapping[type[Quantizer], tuple[Form, ...]] = {
    **{kind: (Levels.of,) for kind in SCALARS},
    Codebook: (Rows.of, Vectors.of, Levels.of),
    Float: (Dense.of,),
    **{kind: (lambda quantized: Turned.of(quantized, pack_tensor),) for kind in (Rotated, Permuted)},
}
KERNELS: Mapping[tuple[Operation, type[Quantizer]], tuple[Form, ...]] = {
    (operation, kind): forms for kind, forms in _OF.items() for operation in ("linear", "embedding")
}
"""Tried in order.  Every other recipe, and what none of them serves, is `Streams`: some rows decoded at a time."""


def pack_tensor(quantized: Quantized, operation: Operation = "linear") -> Packed:
    """The tensor in the first form that serves it."""
    for form in KERNELS.get((operation, type(quantized.recipe)), ()):
        packed = form(quantized)
        if packed is not None:
            return packed
    return Streams(quantized)
