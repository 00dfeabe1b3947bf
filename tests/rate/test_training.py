"""Training with a price or to a budget, on the embedded digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitbook import ECSQ, FitOptions, Plan, Regime, freeze, load, quantize_, save
from bitbook.artifact import to_bytes
from bitbook.data import IGNORED, load_dataset
from bitbook.errors import BudgetError, PlanError
from bitbook.loop import evaluate
from bitbook.models import build_model
from bitbook.rate.pricing import Pricing
from bitbook.rate.training import Epoch, RateTraining, Trained, squeeze, train
from bitbook.slot import slots

MODEL = "mlp-64-32-16-10"
PLAN = Plan({"*.weight": ECSQ(3), "*.bias": ECSQ()})
SHORT = RateTraining(epochs=12, batch=64, lr=1e-2)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_dataset("digits")
    return (data.train_x + 1) / 2, data.train_y, (data.test_x + 1) / 2, data.test_y


def trained(digits: tuple[Tensor, ...], **given: object) -> Trained:
    model = build_model(MODEL, seed=0)
    options = FitOptions(step=0.4, iterations=0)
    return train(model, digits[:2], PLAN, **{"training": SHORT, "options": options, **given})  # type: ignore[arg-type]


def test_a_higher_price_gives_a_smaller_file(digits: tuple[Tensor, ...], tmp_path: Path) -> None:
    found = [trained(digits, lam=lam) for lam in (1e-5, 3e-4)]
    assert found[1].bytes < 0.8 * found[0].bytes
    for result in found:
        path = tmp_path / "net.safetensors"
        save(result.artifact, path)
        assert path.stat().st_size == result.bytes
        fresh = load(path, build_model(MODEL, seed=1))
        x = digits[2]
        assert torch.equal(fresh(x), result.model.eval()(x))  # the file is what training saw
        assert evaluate(fresh, x, digits[3]).accuracy > 60


def test_a_budget_is_kept(digits: tuple[Tensor, ...]) -> None:
    seen: list[Epoch] = []
    result = trained(digits, budget=500, after_epoch=seen.append)
    assert 450 <= result.bytes <= 500
    assert seen == list(result.epochs) and result.lam == seen[-1].lam
    assert evaluate(result.model, *digits[2:]).accuracy > 80


def test_squeezed_files_are_as_large_as_they_may_be() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100, bias=False))
    weight = model[0].weight.detach().clone()
    quantize_(model, Plan({"*": ECSQ()}), options=FitOptions(step=0.02, iterations=0), regime=Regime(codes="latent"))
    pricing = Pricing(model, 1e-6, steps=100)

    def size() -> int:
        return len(to_bytes(freeze(model))[0])

    whole = size()
    errors = []
    for share in (0.95, 0.8):
        with torch.no_grad():
            next(iter(slots(model[0]).values())).latent.copy_(weight)  # type: ignore[operator]
        squeeze(pricing, int(share * whole), size, most=2)
        assert 0.98 * share * whole <= size() <= share * whole
        errors.append(float((model[0].weight.detach() - weight).square().mean()))
    assert 0.02**2 / 13 < errors[0] < errors[1] < 0.03**2  # the least useful codes, not all at once


def test_a_budget_out_of_reach_names_the_smallest_file(digits: tuple[Tensor, ...]) -> None:
    with pytest.raises(BudgetError, match=r"no file of 60 bytes after .* the smallest has \d+") as caught:
        trained(digits, budget=60, training=RateTraining(epochs=2, batch=256, lr=1e-2))
    assert "header" in str(caught.value)


def test_the_same_seed_gives_the_same_bytes(digits: tuple[Tensor, ...]) -> None:
    quick = RateTraining(epochs=2, batch=128)
    a, b = (trained(digits, lam=1e-4, training=quick) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(*(r.artifact.state_dict().values() for r in (a, b)), strict=True))


def test_a_teacher_joins_the_labels(digits: tuple[Tensor, ...]) -> None:
    x, y = digits[:2]
    wrong = nn.functional.one_hot((y + 1) % 10, 10).float() * 20  # a teacher that is always off by one
    result = trained(digits, lam=0.0, teacher=wrong, training=RateTraining(12, 64, 1e-2, distill=1.0))
    assert evaluate(result.model, x, (y + 1) % 10).accuracy > 80
    with pytest.raises(PlanError, match="rows of logits"):
        trained(digits, lam=0.0, teacher=wrong[:5])


@pytest.mark.parametrize("given", [{}, {"lam": 1.0, "budget": 10}, {"lam": -1.0}, {"lam": float("nan")}])
def test_price_and_budget_are_checked(digits: tuple[Tensor, ...], given: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="lam"):
        trained(digits, **given)


def test_the_model_given_stays_as_it_is(digits: tuple[Tensor, ...]) -> None:
    model = build_model(MODEL, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, digits[:2], PLAN, lam=1e-4, training=RateTraining(epochs=1, batch=512))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sequences_are_trained_on_place_by_place() -> None:
    """A label for every place: as many pairs of one place each, ignored labels left out."""
    tokens = torch.randint(6, (12, 5), generator=torch.Generator().manual_seed(0))
    y = (tokens + 1) % 6
    y[3, 2:] = IGNORED
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    plan, once = Plan({"1.weight": ECSQ(4)}), RateTraining(epochs=2, batch=12)
    whole = train(net, (tokens, y), plan, lam=1e-5, training=once)
    kept = y.flatten() != IGNORED
    places = train(net, (tokens.flatten()[kept], y.flatten()[kept]), plan, lam=1e-5, training=replace(once, batch=60))
    assert whole.epochs[0].loss == pytest.approx(places.epochs[0].loss, rel=1e-5)
    assert whole.epochs[1].loss < whole.epochs[0].loss
    with pytest.raises(PlanError, match="the teacher gives"):
        train(net, (tokens, y), plan, lam=1e-5, training=once, teacher=net)
