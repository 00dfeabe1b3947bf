"""Entropy-coded scalar quantization against literal computations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from bitbook import ECSQ, FakeQuantize, FitOptions, Float, quantize
from bitbook.errors import PlanError
from bitbook.quantizer import Price


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def literal(w: float, points: list[float], dead_zone: float) -> int:
    """The magnitude of one weight, by trying all of them."""
    ladder = [0.0, *points]
    while ladder[-1] < abs(w) + points[0]:
        ladder.append(ladder[-1] + (ladder[-1] - ladder[-2] if len(ladder) > 2 else points[0]))
    if abs(w) <= dead_zone * points[0]:
        return 0
    nearest = min(range(1, len(ladder)), key=lambda i: (abs(ladder[i] - abs(w)), i))
    return int(math.copysign(nearest, w))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.sampled_from([0.5, 0.75]), st.integers(0, 10**6))
def test_codes_are_the_nearest_points(gaps: list[int], dead_zone: float, seed: int) -> None:
    points = torch.tensor(gaps).cumsum(0).float() / 4
    recipe = ECSQ(len(gaps), dead_zone=dead_zone)
    w = (weights(5, 6, seed=seed) * 3).mul(16).round() / 16 + 1 / 64  # never in the middle between two
    codes = recipe.encode(w, {"points": points[None]})["codes"]
    expected = [literal(v, points.tolist(), dead_zone) for v in w.flatten().tolist()]
    assert codes.flatten().tolist() == expected


def test_gradients_reach_weights_and_points() -> None:
    source = FakeQuantize(ECSQ(2, points=Float()), nn.Parameter(weights(4, 5)), options=FitOptions(step=0.5))
    value, direction = source(), weights(4, 5, seed=1)
    (value * direction).sum().backward()
    assert source.latent is not None and torch.equal(source.latent.grad, direction)  # type: ignore[arg-type]
    codes = source.freeze().codes["codes"]
    first = sum(
        d * (c > 0) - d * (c < 0) for d, c in zip(direction.flatten(), codes.flatten(), strict=True) if abs(c) == 1
    )
    grad = source.side.points.latent.grad  # type: ignore[union-attr]
    assert grad[0, 0].item() == pytest.approx(float(first - _tail(codes, direction)), abs=1e-5)


def _tail(codes: Tensor, direction: Tensor) -> Tensor:
    """What points beyond the second owe to the first: they go on at the distance of the last two."""
    return (direction * torch.sign(codes) * (codes.abs() - 2).clamp_min(0)).sum()


def test_a_price_trades_error_for_bits() -> None:
    w = weights(20, 30)
    recipe = ECSQ(1, points=Float())
    side = {"points": torch.tensor([[0.25]])}

    class Bits:
        symbols = None

        def __call__(self, codes: Tensor) -> Tensor:
            return torch.where(codes == 0, 0.3, 3.0 + codes.abs())

    bits = Bits()

    costs = []
    for lam in (0.0, 0.002, 0.02, 0.2, 10.0):
        codes = recipe.encode_priced(w, side, Price(lam, {"codes": bits}))["codes"]
        error = (recipe.decode({"codes": codes}, side, (20, 30)) - w).square().sum()
        costs.append((float(bits(codes).sum()), float(error)))
    assert costs == sorted(costs, key=lambda c: -c[0]) and costs == sorted(costs, key=lambda c: c[1])
    assert costs[-1][0] == pytest.approx(0.3 * 600)  # nothing is worth its bits
    assert torch.equal(codes, torch.zeros_like(codes))


def test_the_file_does_not_know_of_the_dead_zone() -> None:
    w = weights(6, 8)
    q = quantize(ECSQ(2, dead_zone=0.8), w)
    assert q.recipe == ECSQ(2)
    assert (q.codes["codes"] == 0).sum() > (quantize(ECSQ(2), w).codes["codes"] == 0).sum()


def test_lloyds_iteration_lowers_the_error() -> None:
    w = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(64, 64, generator=Generator().manual_seed(0)) * 0.998 + 0.001
    )
    options = FitOptions(step=1.0)
    uniform, moved = (quantize(ECSQ(n, points=Float()), w, options=options).decode() for n in (1, 3))
    assert (moved - w).square().mean() < 0.9 * (uniform - w).square().mean()


@pytest.mark.parametrize(
    "recipe", [lambda: ECSQ(0), lambda: ECSQ(256), lambda: ECSQ(dead_zone=0.4), lambda: ECSQ(dead_zone=1)]
)
def test_what_makes_no_sense_is_refused(recipe: type) -> None:
    with pytest.raises(PlanError, match="ECSQ"):
        recipe()
