"""The compiled loops against torch's operations: the same bits, forward and gradient, whatever the numbers."""

from __future__ import annotations

import functools
import math
from typing import Any, cast
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbook import FakeQuantize, FitOptions, Regime, Uniform
from bitbook.scalar import kernels

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e-45, -1e-30, 1e-8, 3e38, -3e38, math.inf, -math.inf, math.nan)
SHAPES = ((1, 8), (3, 16), (5, 33), (2, 3, 16), (40,))
BLOCKS = ((-1, -1), (1, -1), (-1, 8), (1, 8))


def bits(tensor: Tensor) -> list[int]:
    """The patterns of all numbers, every NaN the same."""
    return torch.where(tensor.isnan(), math.nan, tensor).contiguous().view(torch.int32).flatten().tolist()


@pytest.fixture(autouse=True)
def _the_loops_are_there() -> None:
    assert kernels.serve(torch.zeros(8), 8), "these tests need numba"


def without_loops() -> Any:
    return mock.patch.object(kernels, "serve", return_value=False)


@st.composite
def tensors(draw: st.DrawFn, special: bool) -> Tensor:
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    w = torch.randn(shape, generator=generator) * 10.0 ** draw(st.floats(-9, 9)) + draw(st.sampled_from((0.0, 1.0)))
    if draw(st.booleans()):
        w = w.round()  # ties, zeros of both signs, constant blocks
    if special:
        where = draw(st.lists(st.tuples(st.integers(0, w.numel() - 1), st.sampled_from(SPECIAL)), max_size=6))
        for position, value in where:
            w.view(-1)[position] = value
    return w


def trained(recipe: Uniform, w: Tensor, regime: Regime = Regime()) -> list[list[int]]:
    """Bits of the value, of the scale, and of every gradient, where the incoming gradient is special too."""
    source = FakeQuantize(recipe, nn.Parameter(torch.zeros_like(w)), regime=regime)
    latents = cast(Any, (source, source.side.scale))
    with torch.no_grad():
        latents[0].latent.copy_(w)  # beyond what a constructor takes: training may come to NaN
        if regime.side == "learned":
            scale = latents[1].latent
            scale.copy_(torch.linspace(1, -0.2, scale.numel()).reshape(scale.shape))
    value = source()
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    direction.view(-1)[:3] = torch.tensor([0.0, -0.0, math.inf])
    value.backward(direction)
    gradients = [p.grad for p in source.parameters()]
    with torch.no_grad():
        assert bits(source()) == bits(value)
    return [bits(t) for t in (value.detach(), latents[1]().detach(), *gradients) if t is not None]


@given(tensors(special=True), st.sampled_from(BLOCKS), st.integers(1, 8), st.booleans(), st.booleans())
def test_training_is_the_same_to_the_bit(
    w: Tensor, block: tuple[int, int], count: int, symmetric: bool, learned: bool
) -> None:
    if count == 1 and symmetric:
        count = 2
    recipe = Uniform(count, block, symmetric=symmetric, pad=True)
    regime = Regime(side="learned") if learned else Regime()
    with without_loops():
        expected = trained(recipe, w, regime)
    assert trained(recipe, w, regime) == expected


@given(tensors(special=True), st.sampled_from(((-1, -1), (1, -1))), st.integers(2, 8))
def test_the_scale_is_the_same_to_the_bit(w: Tensor, block: tuple[int, int], count: int) -> None:
    recipe = Uniform(count, block)
    scale = recipe.refresh(w, {}, FitOptions())["scale"]
    with without_loops():
        assert bits(scale) == bits(recipe.refresh(w, {}, FitOptions())["scale"])


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.nan, math.inf, 1e-30])
@pytest.mark.parametrize("rows", [1, 3])
def test_scales_that_training_may_come_to(scale: float, rows: int) -> None:
    w = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    side = {"scale": torch.full((rows, 1), scale)}
    run = functools.partial(Uniform(4, (1, -1)).surrogate, w, side, FitOptions())
    with without_loops():
        expected = bits(run())
    assert bits(run()) == expected


@given(st.floats(0, 2.0**120, width=32), st.integers(-255, 0), st.integers(0, 255))
def test_bounds_are_the_next_numbers(scale: float, low: int, high: int) -> None:
    down, up = kernels.bounds(scale, low, high)
    ends = torch.tensor([scale]) * torch.tensor([low, high])
    assert [down, up] == torch.nextafter(ends, torch.tensor([-math.inf, math.inf])).tolist()
    with mock.patch.object(kernels, "_compiled", return_value=None):
        assert kernels.bounds(scale, low, high) == (down, up)


def test_what_the_loops_leave_to_torch() -> None:
    w = torch.zeros(16, 16)
    assert kernels.serve(w) and kernels.serve(nn.Parameter(w), 16)
    assert not kernels.serve(w.t()[1:])
    assert not kernels.serve(w.double())
    assert not kernels.serve(w, 4)
    assert not kernels.serve(torch.zeros(0, 16))
    assert not kernels.serve(torch.zeros(8, device="meta"))
    assert not kernels.serve(w.as_subclass(type("Special", (Tensor,), {})))
    with mock.patch.object(torch, "get_num_threads", return_value=64):
        assert kernels.serve(w)
        assert not kernels.serve(torch.zeros(kernels.SMALL + 1))
    with mock.patch.object(kernels, "_compiled", return_value=None):
        assert not kernels.serve(w)


def test_a_gradient_of_the_gradient_is_torchs() -> None:
    w = torch.linspace(-1, 1, 32).reshape(2, 16).requires_grad_()
    value = Uniform(3, (1, -1)).surrogate(w, {"scale": torch.full((2, 1), 0.2)}, FitOptions())
    (gradient,) = torch.autograd.grad(value.square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), w)
    assert torch.equal(second, torch.where(w.abs() <= 0.6, 2.0, 0.0))
