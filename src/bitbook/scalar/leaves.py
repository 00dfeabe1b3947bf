"""Leaves: where the recursion ends.  Floats and small integers, stored as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import PlanError, WeightError
from bitbook.quantizer import FitOptions, Quantizer, StraightThrough, StreamSpec, code_dtype

FloatType = Literal["float32", "bfloat16", "float16"]
_TYPES: Mapping[str, tuple[torch.dtype, torch.dtype]] = {  # float type, integer type of the same width
    "float32": (torch.float32, torch.int32),
    "bfloat16": (torch.bfloat16, torch.int16),
    "float16": (torch.float16, torch.int16),
}


@dataclass(frozen=True, repr=False)
class Float(Quantizer):
    """Round to a float type; the codes are its bit patterns, least significant byte first in the file."""

    dtype: FloatType = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise PlanError(f"Float(dtype={self.dtype!r}): use one of {', '.join(get_args(FloatType))}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type in torch's words."""
        return _TYPES[self.dtype][0]

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        return (StreamSpec("bits", matrix_shape(shape), 1 << 8 * self.torch_dtype.itemsize),)

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        floating, integer = _TYPES[self.dtype]
        rounded = w.to(floating)
        if not rounded.isfinite().all():
            largest = w.abs().max().item()
            raise WeightError(f"{largest:g} does not fit into {self.dtype}; store it as bfloat16 or float32")
        alphabet = 1 << 8 * floating.itemsize
        bits = rounded.contiguous().view(integer).long() & (alphabet - 1)
        return {"bits": bits.to(code_dtype(alphabet)).reshape(matrix_shape(tuple(w.shape)))}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        floating, integer = _TYPES[self.dtype]
        bits = codes["bits"].to(torch.int64).to(integer)  # wraps to the signed pattern
        return bits.view(floating).float().reshape(shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        return self, side

    def surrogate(self, w: Tensor, side: Mapping[str, Tensor], options: FitOptions) -> Tensor:
        if self.dtype == "float32":
            return w
        return StraightThrough.apply(w, w.detach().to(self.torch_dtype).float())


@dataclass(frozen=True, repr=False)
class Integer(Quantizer):
    """Whole numbers in `[0, alphabet)`, stored exactly; used for zero points."""

    alphabet: int

    def __post_init__(self) -> None:
        if type(self.alphabet) is not int or not 1 <= self.alphabet <= 1 << 16:
            raise PlanError(f"Integer(alphabet={self.alphabet!r}): use a whole number from 1 to 65536")

    def layout(self, shape: Shape) -> tuple[StreamSpec, ...]:
        return (StreamSpec("codes", matrix_shape(shape), self.alphabet),)

    def encode(self, w: Tensor, side: Mapping[str, Tensor], *, importance: Tensor | None = None) -> dict[str, Tensor]:
        whole = w.round().clamp(0, self.alphabet - 1)
        return {"codes": whole.to(code_dtype(self.alphabet)).reshape(matrix_shape(tuple(w.shape)))}

    def decode(self, codes: Mapping[str, Tensor], side: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return codes["codes"].float().reshape(shape)

    def part(
        self, shape: Shape, side: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Quantizer, Mapping[str, Tensor]]:
        return self, side
