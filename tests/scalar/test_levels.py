"""Binary and ternary weights against literal computations; both 1-bit rules of the source material."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitbook import Binary, FakeQuantize, FitOptions, Regime, Ternary, quantize
from bitbook.blocks import Grid
from bitbook.errors import PlanError

f32 = np.float32


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.05


def binary(w: Tensor, rule: str | None, regime: Regime = Regime()) -> FakeQuantize:
    options = FitOptions(range=rule)  # type: ignore[arg-type]
    return FakeQuantize(Binary(), nn.Parameter(w.clone()), options=options, regime=regime)


@pytest.mark.parametrize("rule", [None, "mean"])
def test_the_source_materials_one_bit_rule(rule: str | None) -> None:
    """`mean|W| · sign(W)`, the gradient itself clipped to [-1, 1]."""
    w = weights(6, 7)
    source = binary(w, rule)
    value = source()
    s = source.side.scale().item()
    assert s == pytest.approx(sum(abs(v) for v in w.flatten().tolist()) / w.numel(), rel=1e-6)
    assert value.flatten().tolist() == [s if v > 0 else -s for v in w.flatten().tolist()]
    direction = 2 * weights(6, 7, seed=1).div(0.3)
    (value * direction).sum().backward()
    expected = [min(max(g, -1.0), 1.0) for g in direction.flatten().tolist()]
    assert source.latent.grad.flatten().tolist() == expected
    assert max(expected) == 1.0 and min(map(abs, expected)) < 1


def test_the_later_revisions_one_bit_rule() -> None:
    """`s = (max - min) / 2`, the gradient masked at `|W| > s`."""
    w = weights(6, 7) + 0.1
    source = binary(w, "minmax")
    value = source()
    s = f32(f32(w.max().item()) - f32(w.min().item())) / f32(2)
    assert value.flatten().tolist() == [s if v > 0 else -s for v in w.flatten().tolist()]
    direction = 2 * weights(6, 7, seed=1).div(0.3)
    (value * direction).sum().backward()
    passed = [0.0 if abs(f32(v)) > s else 1.0 for v in w.flatten().tolist()]
    assert 0 < sum(passed) < w.numel()
    assert torch.equal(source.latent.grad, direction * torch.tensor(passed).reshape(6, 7))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_counts_as_positive(zero: float) -> None:
    w = torch.tensor([[zero, -1.0, 1.0]])
    assert binary(w, None)()[0, 0] > 0
    assert quantize(Binary(), w).decode()[0, 0] > 0
    assert quantize(Binary(), w).codes["codes"].tolist() == [[1, 0, 1]]


def test_the_optimal_binary_scale_is_the_mean_magnitude() -> None:
    """Rastegari et al. 2016, eq. 6: no other scale has less squared error."""
    w = weights(8, 9)
    decoded = quantize(Binary(), w).decode()
    error = (decoded - w).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (decoded * factor - w).square().sum() > error


def test_a_learned_binary_scale_gets_the_sum_of_signed_gradients() -> None:
    for recipe in (Binary(), Binary((1, 4))):
        w = weights(4, 8)
        source = FakeQuantize(recipe, nn.Parameter(w), regime=Regime(side="learned"))
        direction = weights(4, 8, seed=3)
        (source() * direction).sum().backward()
        signed = torch.where(w >= 0, direction, -direction)
        expected = Grid.of((4, 8), recipe.block).split(signed).sum(1)
        assert torch.allclose(source.side.scale.latent.grad.flatten(), expected, atol=1e-5)


def test_a_negative_learned_scale_trains_as_it_is_stored() -> None:
    source = binary(weights(4, 8), None, Regime(side="learned"))
    with torch.no_grad():
        source.side.scale.latent.neg_()
    assert torch.equal(source(), source.freeze().decode())


def literal_ternary(values: list[float], rounds: int = 4) -> float:
    """Li & Liu 2016, eq. 5 and 6, then Lloyd's iteration."""
    threshold = 0.7 * sum(map(abs, values)) / len(values)
    scale = 0.0
    for _ in range(rounds):
        large = [abs(v) for v in values if abs(v) > threshold]
        scale = sum(large) / len(large)
        threshold = scale / 2
    return scale


@pytest.mark.parametrize("recipe", [Ternary(), Ternary((1, -1)), Ternary((2, 4))], ids=repr)
def test_ternary_is_its_formula(recipe: Ternary) -> None:
    w = weights(6, 8)
    grid = Grid.of((6, 8), recipe.block)
    q = quantize(recipe, w)
    scales = [literal_ternary(block) for block in grid.split(w).tolist()]
    np.testing.assert_allclose(q.side["scale"].decode().flatten(), scales, rtol=1e-5)
    stored = q.side["scale"].decode().flatten().tolist()
    for block, decoded, s in zip(grid.split(w).tolist(), grid.split(q.decode()).tolist(), stored, strict=True):
        assert decoded == [min((-s, 0.0, s), key=lambda level, v=v: abs(v - level)) for v in block]


def test_ternary_importance_weighs_the_scale() -> None:
    w = torch.tensor([[1.0, 2.0, -1.0, 0.01]])
    importance = torch.tensor([[1.0, 1e6, 1.0, 1.0]])
    assert quantize(Ternary(), w, importance=importance).side["scale"].decode().item() == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("make", [Binary, Ternary])
def test_refusals(make: type[Binary] | type[Ternary]) -> None:
    with pytest.raises(PlanError, match="block="):
        make((0, 1))
    with pytest.raises(PlanError, match="range='mse' does not fit"):
        quantize(make(), torch.ones(2, 2), options=FitOptions(range="mse"))
