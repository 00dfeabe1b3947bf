"""Sorted hidden units: the same network, in another order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitbook import ECSQ, FitOptions, Plan, quantize_
from bitbook.errors import PlanError
from bitbook.models import build_model
from bitbook.surgery.reorder import sort_units


@pytest.mark.parametrize("quantized", [False, True])
def test_the_network_computes_what_it_did(quantized: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight *= torch.rand_like(layer.weight) > 0.6  # type: ignore[operator]
    if quantized:
        quantize_(model, Plan({"*": ECSQ()}), options=FitOptions(step=0.1))
    x = torch.randn(30, 8)
    before = model(x)
    sort_units([model[0], model[2], model[4]])  # type: ignore[list-item]
    torch.testing.assert_close(model(x), before)
    busy = model[0].weight.count_nonzero(1) + model[2].weight.count_nonzero(0)  # type: ignore[operator]
    assert bool((busy[:-1] >= busy[1:]).all())


@pytest.mark.parametrize("quantized", [False, True])
def test_channels_move_with_the_places_they_own(quantized: bool) -> None:
    torch.manual_seed(0)
    model = build_model("lenet-5-4-6-9", seed=0)
    layers = [module for module in model.children() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 4 * (torch.rand_like(layer.weight) > 0.7)
    if quantized:
        quantize_(model, Plan({"*": ECSQ()}), options=FitOptions(step=0.1))
    x = torch.randn(30, 784)
    before = model(x)
    sort_units(layers)
    torch.testing.assert_close(model(x), before)
    busy = layers[1].weight.count_nonzero((1, 2, 3)) + layers[2].weight.reshape(9, 6, 16).count_nonzero((0, 2))
    assert bool((busy[:-1] >= busy[1:]).all())


def test_what_cannot_be_sorted_is_refused() -> None:
    with pytest.raises(PlanError, match="units"):
        sort_units([nn.Linear(3, 4), nn.Linear(5, 2)])
    with pytest.raises(PlanError, match="takes 8"):
        sort_units([nn.Linear(3, 4), nn.Linear(8, 2)])  # only channels own several inputs
    with pytest.raises(PlanError, match="takes 7"):
        sort_units([nn.Conv2d(1, 4, 3), nn.Linear(7, 2)])
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    quantize_(model, Plan({"0.weight": ECSQ(1, (1, -1))}))
    with pytest.raises(PlanError, match="share side tensors"):
        sort_units([model[0], model[1]])  # type: ignore[list-item]
