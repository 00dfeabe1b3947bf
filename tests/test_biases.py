"""Mean outputs after a correction of biases."""

import copy

import pytest
import torch
from torch import nn

from bitbook.biases import correct_biases
from bitbook.errors import PlanError


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten(), nn.Linear(48, 5), nn.Tanh()
    )


def test_means_of_the_outputs_come_back() -> None:
    reference = _net().eval()
    x = torch.randn(200, 2, 8, 8)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.1 * torch.rand_like(parameter)
    before = (model[:5](x) - reference[:5](x)).mean(0).abs().max()
    names = correct_biases(model, reference, x)
    after = (model[:5](x) - reference[:5](x)).mean(0).abs().max()
    assert names == ["0.bias", "4.bias"]
    assert after < 0.05 * before


def test_an_equal_model_stays_as_it_is() -> None:
    reference = _net()
    model = copy.deepcopy(reference)
    correct_biases(model, reference, torch.randn(20, 2, 8, 8))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_inputs_nothing_is_corrected() -> None:
    with pytest.raises(PlanError, match="there are none"):
        correct_biases(_net(), _net(), [])
