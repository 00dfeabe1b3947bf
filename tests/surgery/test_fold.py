"""A change of inputs is taken into weights and bias without changing what the layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitbook import ECSQ, Float, Plan, Regime, Uniform, freeze, quantize_
from bitbook.errors import PlanError
from bitbook.surgery.fold import fold_inputs


@pytest.mark.parametrize("recipe", [None, ECSQ(3, points=Float()), ECSQ(2, (1, -1)), Uniform(4)], ids=str)
def test_the_layer_gives_the_same(recipe: ECSQ | Uniform | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5))
    if recipe is not None:
        quantize_(model, Plan({"0.weight": recipe}), regime=Regime(side="learned"))
    x = torch.randn(20, 12)
    before, codes = model((x + 1) / 2), _codes(model)
    fold_inputs(model[0], 0.5, 0.5)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(_codes(model), codes, strict=True))


def _codes(model: nn.Module) -> list[torch.Tensor]:
    quantized = freeze(model).tensors["0.weight"]
    return [] if isinstance(quantized, torch.Tensor) else list(quantized.codes.values())


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(PlanError, match="power of two"):
        fold_inputs(nn.Linear(2, 2), 0.3, 0.0)
    with pytest.raises(PlanError, match="with a bias"):
        fold_inputs(nn.Linear(2, 2, bias=False), 0.5, 0.0)


def test_a_convolution_takes_it_too() -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 8, 8)
    before = layer(0.5 * x + 0.5)
    fold_inputs(layer, 0.5, 0.5)
    torch.testing.assert_close(layer(x), before)
    with pytest.raises(PlanError, match="without padding"):
        fold_inputs(nn.Conv2d(1, 1, 3, padding=1), 0.5, 0.0)
