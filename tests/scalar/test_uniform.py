"""Uniform quantization against the source material's formulas, computed slowly and literally."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbook import FakeQuantize, FitOptions, Float, Regime, Uniform, quantize
from bitbook.blocks import Grid
from bitbook.errors import PlanError
from bitbook.quantizer import Range

f32 = np.float32
BITS = (2, 3, 4, 5, 6, 7, 8)


def weights(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def literal_symmetric(w: Tensor, bits: int) -> tuple[Tensor, float]:
    """`s = (max - min) / (2 q)`, at least 1e-8; `s · clip(round(W / s), -q, q)`, number by number."""
    q = 2 ** (bits - 1) - 1
    values = [f32(v) for v in w.flatten().tolist()]
    s = max(f32(f32(max(values) - min(values)) / f32(2 * q)), f32(1e-8))
    levels = [f32(min(max(round(float(f32(v / s))), -q), q)) for v in values]  # Python rounds half to even, as torch
    return torch.tensor([float(f32(s * level)) for level in levels]).reshape(w.shape), float(s)


def literal_mask(w: Tensor, bits: int, s: float) -> Tensor:
    """One where the gradient passes: zero where `|W| > q_max · s`."""
    limit = f32(f32(2 ** (bits - 1) - 1) * f32(s))
    return torch.tensor([0.0 if abs(f32(v)) > limit else 1.0 for v in w.flatten().tolist()]).reshape(w.shape)


def trained(recipe: Uniform, w: Tensor, range: Range | None = None, regime: Regime = Regime()) -> FakeQuantize:
    return FakeQuantize(recipe, nn.Parameter(w.clone()), regime=regime, options=FitOptions(range=range))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_source_materials_forward_and_gradient(bits: int, shift: float) -> None:
    w = weights(7, 9) + shift  # shifted: minimum and maximum differ, so that weights are clipped
    expected, s = literal_symmetric(w, bits)
    source = trained(Uniform(bits), w)
    value = source()
    assert torch.equal(value, expected)
    assert source.side.scale().item() == s
    direction = weights(7, 9, seed=1)
    (value * direction).sum().backward()
    mask = literal_mask(w, bits, s)
    assert shift == 0 or not mask.all()  # some weights are clipped
    assert torch.equal(source.latent.grad, direction * mask)
    assert torch.equal(quantize(Uniform(bits), w).decode(), expected)
    assert Uniform(bits).alphabet == 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_the_mask_includes_its_bound(bits: int) -> None:
    q = 2 ** (bits - 1) - 1
    w = torch.tensor([[-q, q, 0.25, -0.25]]).float()  # minimum and maximum lie exactly on ±q·s, s = 1
    source = trained(Uniform(bits), w)
    source().sum().backward()
    assert torch.equal(source.latent.grad, torch.ones(1, 4))
    beyond = torch.tensor([[np.nextafter(f32(q), f32(np.inf)).item(), -q]])
    frozen_scale = trained(Uniform(bits), beyond, "mse")
    with torch.no_grad():
        frozen_scale.side.scale.latent.fill_(1.0)
    frozen_scale().sum().backward()
    assert frozen_scale.latent.grad.tolist() == [[0.0, 1.0]]


def test_a_constant_tensor_meets_the_floor_of_the_scale() -> None:
    expected, s = literal_symmetric(torch.full((2, 3), 0.5), 4)
    assert s == f32(1e-8)
    assert torch.equal(trained(Uniform(4), torch.full((2, 3), 0.5))(), expected)


@given(st.integers(0, 10**6), st.floats(-4, 4), st.sampled_from(BITS))
def test_the_source_materials_formula_for_any_weights(seed: int, magnitude: float, bits: int) -> None:
    w = weights(3, 5, seed=seed, scale=10.0**magnitude)
    assert torch.equal(trained(Uniform(bits), w)(), literal_symmetric(w, bits)[0])


def test_the_scale_follows_the_latent_weights() -> None:
    source = trained(Uniform(4), weights(4, 4))
    for factor in (3.0, 0.1):
        with torch.no_grad():
            source.latent.mul_(factor)
        assert torch.equal(source(), literal_symmetric(source.latent.detach(), 4)[0])
    assert not [name for name, _ in source.named_parameters() if "scale" in name]


@pytest.mark.parametrize("block", [(1, -1), (-1, 1), (1, 4), (3, 2), (2, -1)])
@pytest.mark.parametrize("range", ["minmax", "absmax", "mse", "lsq"])
def test_each_block_is_quantized_as_a_tensor_of_its_own(block: tuple[int, int], range: Range) -> None:
    w = weights(6, 8) * torch.arange(1, 9)
    grid = Grid.of((6, 8), block)
    options = FitOptions(range=range)
    whole = quantize(Uniform(3, block), w, options=options).decode()
    source = trained(Uniform(3, block), w, range)
    value = source()
    value.sum().backward()
    alone = [trained(Uniform(3), part.reshape(grid.r, grid.c), range) for part in grid.split(w)]
    values = [each() for each in alone]
    torch.stack(values).sum().backward()
    assert torch.allclose(whole, grid.join(torch.stack(values).flatten(1), (6, 8)), rtol=1e-6)
    assert torch.allclose(value, whole, rtol=1e-6)
    gradients = torch.stack([each.latent.grad for each in alone]).flatten(1)
    assert torch.equal(source.latent.grad, grid.join(gradients, (6, 8)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.1, 2.0])
def test_a_zero_point_is_jacobs_equation(bits: int, shift: float) -> None:
    w = weights(5, 6) + shift
    top = 2**bits - 1
    lo, hi = min(f32(w.min().item()), f32(0)), max(f32(w.max().item()), f32(0))
    s = f32(f32(hi - lo) / f32(top))
    z = min(max(round(float(f32(-lo / s))), 0), top)
    steps = [min(max(round(float(f32(f32(v) / s))) + z, 0), top) for v in w.flatten().tolist()]
    expected = torch.tensor([float(f32(s * f32(step - z))) for step in steps]).reshape(w.shape)
    q = quantize(Uniform(bits, symmetric=False), w)
    assert torch.equal(q.decode(), expected)
    assert q.side["zero_point"].decode().item() == z
    assert q.codes["codes"].flatten().tolist() == steps
    source = trained(Uniform(bits, symmetric=False), w)
    value = source()
    value.sum().backward()
    assert torch.equal(value, expected)
    inside = [f32(s * f32(0 - z)) <= f32(v) <= f32(s * f32(top - z)) for v in w.flatten().tolist()]
    assert source.latent.grad.flatten().bool().tolist() == inside


def test_zero_is_a_level() -> None:
    w = weights(5, 6) + 3
    w[0, 0] = 0
    for recipe in (Uniform(4), Uniform(4, symmetric=False), Uniform(4, (1, 2), symmetric=False)):
        assert quantize(recipe, w).decode()[0, 0] == 0


def test_absmax_and_lsq_ranges() -> None:
    w = weights(5, 6) + 0.2
    q = 7
    absmax = quantize(Uniform(4), w, options=FitOptions(range="absmax")).side["scale"].decode().item()
    assert absmax == f32(w.abs().max().item()) / f32(q)
    lsq = quantize(Uniform(4), w, options=FitOptions(range="lsq")).side["scale"].decode().item()
    assert lsq == pytest.approx(2 * w.abs().mean().item() / math.sqrt(q), rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_range_is_the_best_of_a_slow_search(symmetric: bool) -> None:
    w = weights(10, 20) + 0.1
    recipe = Uniform(3, symmetric=symmetric)
    q = quantize(recipe, w, options=FitOptions(range="mse"))
    error = (q.decode() - w).square().sum().item()
    for range in ("absmax", "minmax"):
        other = quantize(recipe, w, options=FitOptions(range=range)).decode()
        assert error <= (other - w).square().sum().item() * (1 + 1e-6)
    side = {name: stored.decode() for name, stored in q.side.items()}
    for share in np.linspace(0.2, 1, 33):
        lo, hi = (extreme.reshape(1, 1) * float(share) for extreme in torch.aminmax(w))
        side = recipe.from_range(lo, hi, lo, FitOptions(range="absmax"))
        tried = recipe.decode(recipe.encode(w, side), side, (10, 20))
        assert error <= (tried - w).square().sum().item() * (1 + 1e-3)


def test_importance_moves_the_mse_range() -> None:
    w = weights(20, 20)
    w[0, 0] = 5.0
    importance = torch.ones_like(w)
    importance[0, 0] = 1000.0
    options = FitOptions(range="mse")
    plain, weighted = (quantize(Uniform(3), w, options=options, importance=i).decode() for i in (None, importance))
    assert abs(weighted[0, 0] - 5) < 0.01 < abs(plain[0, 0] - 5)


@pytest.mark.parametrize("recipe", [Uniform(3), Uniform(3, (1, 4)), Uniform(3, (1, 4), symmetric=False)], ids=repr)
def test_the_gradient_of_a_learned_scale_is_lsqs_equation_3(recipe: Uniform) -> None:
    """∂ŵ/∂s = round(w/s) - w/s inside, ±the bound outside; times 1 / √(N · Q_P), section 2.2."""
    w = weights(4, 8) + 0.05
    source = trained(recipe, w, None, Regime(side="learned"))
    with torch.no_grad():
        source.side.scale.latent.mul_(0.6)  # so that some weights lie outside
    direction = weights(4, 8, seed=2)
    (source() * direction).sum().backward()
    grid = Grid.of((4, 8), recipe.block)
    scales = source.side.scale.latent.detach().flatten().tolist()
    zeros = [0] * len(scales) if recipe.symmetric else source.side.zero_point().flatten().tolist()
    q_p = recipe.q_max if recipe.symmetric else recipe.alphabet - 1
    expected, outside = [], 0
    for values, upstream, s, z in zip(grid.split(w), grid.split(direction), scales, zeros, strict=True):
        total = 0.0
        low, high = (-q_p, q_p) if recipe.symmetric else (-z, recipe.alphabet - 1 - z)
        for v, u in zip(values.tolist(), upstream.tolist(), strict=True):
            ratio = float(f32(f32(v) / f32(s)))
            outside += not low < ratio < high
            total += u * (round(ratio) - ratio if low < ratio < high else low if ratio <= low else high)
        expected.append(total / math.sqrt(grid.r * grid.c * q_p))
    assert outside
    np.testing.assert_allclose(source.side.scale.latent.grad.flatten(), expected, rtol=1e-4, atol=1e-5)


def test_learned_scales_reduce_a_loss() -> None:
    w = weights(16, 16)
    source = trained(Uniform(2), w, "lsq", Regime(side="learned"))
    source.latent.requires_grad_(False)
    optimizer = torch.optim.SGD([source.side.scale.latent], lr=1e-3)
    losses = []
    for _ in range(50):
        loss = (source() - w).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recipe", [Uniform(4), Uniform(4, (1, 4)), Uniform(4, symmetric=False)], ids=repr)
def test_a_scale_stored_as_zero_is_a_block_of_zeros(recipe: Uniform) -> None:
    w = weights(4, 8)
    source = trained(recipe, w, "mse")
    with torch.no_grad():
        source.side.scale.latent.zero_()
    value = source()
    value.sum().backward()
    assert not value.any() and source.latent.grad.isfinite().all()
    assert torch.equal(source.freeze().decode(), value)


def test_scales_lost_to_a_narrow_type_lose_their_block_only() -> None:
    w = weights(2, 8)
    w[0] *= 1e-9
    decoded = quantize(Uniform(4, (1, -1), scale=Float("float16")), w).decode()
    assert not decoded[0].any() and decoded[1].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "1 to 8"),
        (lambda: Uniform(9), "1 to 8"),
        (lambda: Uniform(True), "1 to 8"),
        (lambda: Uniform(4.0), "1 to 8"),  # type: ignore[arg-type]
        (lambda: Uniform(1), "Binary"),
        (lambda: Uniform(4, (0, 1)), "block="),
        (lambda: trained(Uniform(4), torch.ones(2, 2), "mean"), "minmax, absmax, mse, lsq"),
        (lambda: trained(Uniform(4, symmetric=False), torch.ones(2, 2), "lsq"), "symmetric=True"),
    ],
)
def test_refusals(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=message):
        make()
