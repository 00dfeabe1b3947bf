"""A tensor some rows at a time: recipes whose blocks stand alone give the same codes, in a fraction of the memory.

file ─slab─► float32 ─encode─► codes of the whole tensor          codes ─slab─► float32 ─► file
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from bitbook.blocks import WHOLE, Grid, Shape, matrix_shape
from bitbook.checkpoints.source import Stored
from bitbook.errors import PlanError, WeightError
from bitbook.quantizer import FitOptions, Quantized, Quantizer, code_dtype, encode_fitted, quantize
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float
from bitbook.scalar.levels import Binary, Ternary
from bitbook.scalar.table import PowersOfTwo, Table
from bitbook.scalar.uniform import Uniform

ELEMENTS = 1 << 20
"""Of a slab, unless a row of blocks has more."""

_APART = (ECSQ, Uniform, Binary, Ternary, Table, PowersOfTwo)


class Slab(NamedTuple):
    """Elements from `start` to `stop` in reading order, as a tensor of `shape`, with some rows of blocks."""

    start: int
    stop: int
    shape: Shape
    blocks: slice | None
    """Rows of blocks; None where the tensor has one, which all slabs share."""


class Encoded(NamedTuple):
    """A tensor's codes, and what they cost in accuracy."""

    quantized: Quantized
    error: float
    """Sum of squared differences from the weights."""
    power: float
    """Sum of squared weights."""


def slabs(recipe: Quantizer, shape: Shape) -> list[Slab] | None:
    """How a tensor falls into slabs; None where the recipe looks at all of it at once."""
    rows, cols = matrix_shape(shape)
    if not isinstance(recipe, (*_APART, Float)) or not rows * cols:
        return None
    block = getattr(recipe, "block", WHOLE)
    if block == WHOLE:
        ends = range(0, rows * cols, ELEMENTS)
        return [Slab(i, min(i + ELEMENTS, rows * cols), (min(ELEMENTS, rows * cols - i),), None) for i in ends]
    height = 1 if block[0] == -1 else block[0]
    step = max(ELEMENTS // max(cols * height, 1), 1)  # rows of blocks
    found = []
    for first in range(0, -(-rows // height), step):
        last = min((first + step) * height, rows)
        blocks = None if block[0] == -1 else slice(first, first + step)
        found.append(Slab(first * height * cols, last * cols, (last - first * height, cols), blocks))
    return found


def encode(stored: Stored, recipe: Quantizer, options: FitOptions, seed: int) -> Encoded:
    """What `quantize` gives for a tensor that is on disk; raises `WeightError` and `PlanError` with its name."""
    try:
        if not stored.floating:
            raise WeightError(f"expected floating-point weights, got {stored.dtype}; leave it dense")
        recipe = recipe.resolve(stored.shape)
        cuts = slabs(recipe, stored.shape)
        if cuts is None or len(recipe.layout(stored.shape)) != 1:
            w = stored.floats(0, stored.numel).reshape(stored.shape)
            quantized = quantize(recipe, w, options=options, generator=Generator().manual_seed(seed))
            decoded = quantized.decode()
            return Encoded(quantized, _square(w - decoded), _square(w))
        return _encode_slabs(stored, recipe, options, cuts, seed)
    except (WeightError, PlanError) as error:
        named = str(error).startswith(f"{stored.name}: ")
        raise type(error)(str(error) if named else f"{stored.name}: {error}") from None


def _encode_slabs(stored: Stored, recipe: Quantizer, options: FitOptions, cuts: list[Slab], seed: int) -> Encoded:
    error = power = 0.0

    def codes_of(recipe: Quantizer, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nonlocal error, power
        (spec,) = recipe.layout(stored.shape)
        codes = torch.empty(spec.grid, dtype=code_dtype(spec.alphabet))
        flat = codes.view(-1)
        for cut in cuts:
            w = stored.floats(cut.start, cut.stop).reshape(cut.shape)
            own = _side_of(recipe, stored.shape, side, cut)
            found = recipe.encode(w, own)
            flat[cut.start : cut.stop] = found[spec.name].reshape(-1)
            error += _square(w - recipe.decode(found, own, cut.shape))
            power += _square(w)
        return {spec.name: codes}

    anywhere = torch.empty(stored.shape, device="meta")
    quantized = encode_fitted(recipe, anywhere, _fitted(stored, recipe, options, cuts, seed), options, codes_of)
    return Encoded(quantized, error, power)


def _fitted(stored: Stored, recipe: Quantizer, options: FitOptions, cuts: list[Slab], seed: int) -> dict[str, Tensor]:
    """The side tensors: of each slab where its blocks are its own, else of the tensor as a whole."""
    if isinstance(recipe, Float):
        return {}
    fit: Callable[[Tensor], dict[str, Tensor]] = lambda w: recipe.fit(  # noqa: E731
        w, options=options, generator=Generator().manual_seed(seed)
    )
    if isinstance(recipe, ECSQ) and recipe.size == 1 and options.step is not None:
        return fit(torch.empty(stored.shape, device="meta"))  # the step is given, so the weights are not looked at
    if cuts[0].blocks is None:
        return fit(stored.floats(0, stored.numel).reshape(stored.shape))
    own = [fit(stored.floats(cut.start, cut.stop).reshape(cut.shape)) for cut in cuts]
    return {name: torch.cat([side[name] for side in own]) for name in own[0]}


def decode(quantized: Quantized) -> Iterator[tuple[int, Tensor]]:
    """The tensor's elements in reading order, some at a time, each run with its first place."""
    cuts = slabs(quantized.recipe, quantized.shape)
    if cuts is None or len(quantized.codes) != 1:
        yield 0, quantized.decode().reshape(-1)
        return
    ((name, codes),) = quantized.codes.items()
    side = {n: q.decode() for n, q in quantized.side.items()}
    for cut in cuts:
        own = codes.reshape(-1)[cut.start : cut.stop].reshape(matrix_shape(cut.shape))
        values = quantized.recipe.decode({name: own}, _side_of(quantized.recipe, quantized.shape, side, cut), cut.shape)
        yield cut.start, values.reshape(-1)


def _side_of(recipe: Quantizer, shape: Shape, side: Mapping[str, Tensor], cut: Slab) -> Mapping[str, Tensor]:
    """The side tensors of a slab; their first axis counts rows of blocks, or blocks."""
    if cut.blocks is None:
        return side
    grid = Grid.of(shape, recipe.block, pad=getattr(recipe, "pad", False))  # type: ignore[attr-defined]
    found = {}
    for name, value in side.items():
        assert len(value) in (grid.R, grid.R * grid.C), f"{recipe!r}: {name} is {tuple(value.shape)}"
        each = len(value) // grid.R
        found[name] = value[cut.blocks.start * each : cut.blocks.stop * each]
    return found


def _square(w: Tensor) -> float:
    return float(w.square().sum(dtype=torch.float64))
