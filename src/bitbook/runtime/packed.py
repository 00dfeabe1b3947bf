"""A tensor that stays packed: what all forms of it share, and the two forms that serve every recipe.

    Quantized ──► Packed ──tile──► some rows of floats ──► product       never all of it, where rows stand apart

The product by tiles is the reference: any recipe, any device.  Forms that know more multiply without decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float as F32
from jaxtyping import Int
from torch import Tensor, nn

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import ModelMismatch
from bitbook.quantizer import Quantized, Quantizer, select_rows
from bitbook.runtime.loops import LANES
from bitbook.runtime.packing import PackedCodes
from bitbook.runtime.products import Prepared
from bitbook.scalar.leaves import Float

TILE = 1 << 19
"""Elements of a tile: two megabytes of floats, which a processor's cache holds."""

_SAME = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Packed(Prepared, ABC):
    """A tensor as codes, with what gives them back.

    Everything it needs are buffers: `.to(device)` moves it, and a change of the floating-point type leaves them alone.
    It has no gradient.
    """

    how: str
    """In a report: how products are computed."""
    dtype: torch.dtype = torch.float32
    """What a parameter in its place would have by now: in this type, layers hand on what is decoded."""

    def __init__(self, recipe: Quantizer, shape: Shape) -> None:
        super().__init__()
        self.recipe, self.shape = recipe, shape
        self.rows, self.cols = matrix_shape(shape)

    @abstractmethod
    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        """Rows of the tensor as a matrix."""

    @property
    def tile_rows(self) -> int:
        """How many rows are decoded at once; a multiple of the lanes."""
        return max(TILE // max(self.cols, 1) // LANES, 1) * LANES

    def decode(self) -> F32[Tensor, "..."]:
        """The whole tensor."""
        return self.tile(0, self.rows).reshape(self.shape)

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        """Rows by their numbers."""
        return self.tile(0, self.rows)[index]

    def _by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The reference, which decodes some rows after the other."""
        y = x.new_empty(len(x), self.rows)
        step = self.tile_rows
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            y[:, start:stop] = x @ self.tile(start, stop).to(x.dtype).T
        return y if bias is None else y.add_(bias)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def get_extra_state(self) -> Tensor:
        """What this is, as bytes, so that a state of another recipe is not loaded in silence."""
        return torch.tensor(list(self._described().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises `ModelMismatch` where the state is of another recipe or shape."""
        found = bytes(state.tolist()).decode()
        if found != self._described():
            raise ModelMismatch(f"a packed tensor of {found} does not fit into {self._described()}; load its own file")
        self._prepared = None

    def _described(self) -> str:
        widths = [(m.bits, m.low) for m in self.modules() if isinstance(m, PackedCodes)]
        return f"{self.recipe!r}, shape {self.shape}, (bits, least) {widths}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        own, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = own
        for name, buffer in own.items():
            if buffer is not None:  # as integers, which `.half()` and the like pass by
                same = _SAME.get(buffer.dtype, buffer.dtype)
                own[name] = fn(buffer.view(same)).view(buffer.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.recipe!r}, {self.rows} × {self.cols}, {8 * self.nbytes / (self.rows * self.cols):.2f} bits each"


class Dense(Packed):
    """Floats at the width at which they are stored: where the recursion ends, and for side tensors of few elements."""

    how = "floats"
    values: Tensor

    def __init__(self, recipe: Quantizer, shape: Shape, values: Tensor) -> None:
        super().__init__(recipe, shape)
        self.register_buffer("values", values.reshape(self.rows, self.cols))

    @classmethod
    def of(cls, quantized: Quantized) -> Dense:
        """What the codes stand for; a float type stays one."""
        recipe, values = quantized.recipe, quantized.decode()
        return cls(recipe, quantized.shape, values.to(recipe.torch_dtype) if isinstance(recipe, Float) else values)

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        return self.values[start:stop].float()

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        return self.values[index].float()

    def linear(self, x: F32[Tensor, "batch cols"], bias: F32[Tensor, " rows"] | None) -> F32[Tensor, "batch rows"]:
        return nn.functional.linear(x, self.values.to(x.dtype), bias)


class Streams(Packed):
    """Any recipe: its code streams packed, its side tensors packed or, where these are few, as floats."""

    how = "decoded in each call"
    few = 1 << 12
    """Elements up to which a side tensor is kept as floats."""

    def __init__(self, quantized: Quantized) -> None:
        super().__init__(quantized.recipe, quantized.shape)
        specs = {spec.name: spec for spec in quantized.recipe.layout(quantized.shape)}
        self.codes, self.side = nn.Module(), nn.Module()  # a ModuleDict would refuse names such as "values"
        for name, codes in quantized.codes.items():
            self.codes.add_module(name, PackedCodes(codes, specs[name]))
        for name, child in quantized.side.items():
            self.side.add_module(name, self._held(child))
        apart = self.rows > LANES and select_rows(quantized, torch.tensor([0])) is not None
        self.apart = apart and all(packed.by_row for packed in self._streams().values())
        """Whether some rows can be decoded without the others."""

    def _held(self, side: Quantized) -> Packed:
        few = side.shape == () or Dense.of(side).values.numel() <= self.few
        return Dense.of(side) if few or isinstance(side.recipe, Float) else Streams(side)

    def _streams(self) -> dict[str, PackedCodes]:
        return {name: packed for name, packed in self.codes.named_children() if isinstance(packed, PackedCodes)}

    def _sides(self) -> dict[str, Packed]:
        return {name: packed for name, packed in self.side.named_children() if isinstance(packed, Packed)}

    @property
    def tile_rows(self) -> int:
        return super().tile_rows if self.apart else self.rows

    def decode(self) -> F32[Tensor, "..."]:
        codes = {name: packed.unpack() for name, packed in self._streams().items()}
        return self.recipe.decode(codes, {name: packed.decode() for name, packed in self._sides().items()}, self.shape)

    def tile(self, start: int, stop: int) -> F32[Tensor, "some cols"]:
        if not self.apart:
            return self.decode().reshape(self.rows, self.cols)[start:stop]
        codes = {name: packed.unpack(start, stop) for name, packed in self._streams().items()}
        return self._decoded(codes, stop - start, lambda side: side.tile(start, stop))

    def select(self, index: Int[Tensor, " some"]) -> F32[Tensor, "some cols"]:
        if not self.apart:
            return super().select(index)
        codes = {name: packed.select(index) for name, packed in self._streams().items()}
        return self._decoded(codes, len(index), lambda side: side.select(index))

    def _decoded(
        self, codes: dict[str, Tensor], rows: int, part: Callable[[Packed], Tensor]
    ) -> F32[Tensor, "some cols"]:
        """As `select_rows` has it: side tensors with as many rows as the tensor go with them, others are shared."""
        side = {
            name: part(packed) if packed.shape[0] == self.rows else packed.decode()
            for name, packed in self._sides().items()
        }
        return self.recipe.decode(codes, side, (rows, *self.shape[1:])).reshape(rows, self.cols)
