"""The price of bits in the gradient, against the difference that a step of a weight makes."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, nn

from bitbook import ECSQ, Codebook, FitOptions, Plan, Quantizer, Regime, Uniform, quantize_
from bitbook.errors import PlanError
from bitbook.rate.pricing import Pricing
from bitbook.slot import slots


def network(block: tuple[int, int] = (-1, -1)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    quantize_(model, Plan({"*.weight": ECSQ(3, block)}), options=FitOptions(step=0.1, iterations=0))
    return model


@pytest.mark.parametrize("block", [(-1, -1), (1, -1)])
def test_the_gradient_is_the_slope_between_two_levels(block: tuple[int, int]) -> None:
    model = network(block)
    pricing = Pricing(model, 0.5, steps=10, ramp=0.0, smooth=0.0)
    pricing.add()
    source = slots(model[0])["weight"]
    (rates,) = pricing.price(source).bits.values()  # type: ignore[arg-type]
    w, points = source.latent, source.side.points()  # type: ignore[union-attr]
    for i, j in ((0, 0), (3, 7), (19, 11), (8, 2)):
        value = w[i, j].item()  # type: ignore[index]
        ladder = [0.0, *points[i if block[0] == 1 else 0].tolist()]
        rung = sum(abs(value) >= p for p in ladder[1:])
        below, above = (rates(torch.full((20, 12), size).int())[i, j].item() for size in (rung, rung + 1))
        distance = ladder[rung + 1] - ladder[rung] if rung < 3 else ladder[3] - ladder[2]
        expected = 0.5 * max(above - below, 0) / distance * (1 if value > 0 else -1)
        assert w.grad[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (-1, 1), (1, 4)])
def test_the_loops_give_what_torch_gives(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 12, generator=Generator().manual_seed(1))
    results = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr("bitbook.scalar.ladder.serve", lambda w: False)
        model = network(block)
        pricing = Pricing(model, 1e-3, steps=10, ramp=0.0, smooth=0.0)
        value = model(x)
        value.square().sum().backward()
        pricing.add()
        results.append([value.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


def test_weights_are_smooth_first_and_rounded_in_the_end() -> None:
    model = network()
    pricing = Pricing(model, 0.0, steps=10, smooth=0.5)
    source = slots(model[0])["weight"]
    assert torch.equal(model[0].weight, source.latent)  # type: ignore[arg-type]
    for _ in range(5):
        pricing.step()
    assert torch.equal(model[0].weight, source.freeze().decode())  # type: ignore[arg-type, operator]


def test_λ_rises_along_the_ramp() -> None:
    model = network()
    pricing = Pricing(model, 1.0, steps=100, ramp=0.1, smooth=0.0)
    norms = []
    for _ in range(12):
        model.zero_grad()
        pricing.add()
        norms.append(float(slots(model[0])["weight"].latent.grad.norm()))  # type: ignore[union-attr, arg-type]
        pricing.step()
    assert norms[0] == 0 and norms == sorted(norms) and norms[10] == norms[11]


def test_a_model_without_magnitudes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    quantize_(model, Plan({"*.weight": Codebook(4, (1, 4))}))
    with pytest.raises(PlanError, match="ECSQ"):
        Pricing(model, 1.0, steps=10)


@pytest.mark.parametrize("recipe", [Uniform(4), Uniform(4, (1, -1)), ECSQ(2)], ids=str)
def test_every_order_of_magnitudes_can_be_priced(recipe: Quantizer) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    with torch.no_grad():
        model[0].weight.pow_(3).mul_(10)  # type: ignore[operator]  # large ones are rare, as in trained layers
    quantize_(model, Plan({"*.weight": recipe}), regime=Regime(side="learned"))
    latent = slots(model[0])["weight"].latent
    Pricing(model, 0.05, steps=10, ramp=0.0, smooth=0.0).add()
    pull = latent.grad * torch.sign(latent)  # type: ignore[arg-type, operator, union-attr]
    assert bool((pull >= 0).all()) and (pull > 0).float().mean() > 0.2  # gradients are gone down: towards zero


def test_a_scale_that_follows_the_weights_takes_the_price_away() -> None:
    """Under a min–max scale, smaller weights are the same codes: nothing would be saved."""
    model = nn.Sequential(nn.Linear(12, 20))
    quantize_(model, Plan({"*.weight": Uniform(4)}))
    with pytest.raises(PlanError, match="learned scale"):
        Pricing(model, 1.0, steps=10)
