"""Mean outputs after a correction of biases."""

import copy

import pytest
import torch
from torch import nn

from bitbook.errors import PlanError
from bitbook.surgery.biases import correct_biases


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


def test_a_layer_used_several_times_is_corrected_once() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.layer(x), self.layer(x + 1), self.layer(x - 1)], 1)

    reference = Thrice()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.layer.bias += 0.5
    correct_biases(model, reference, [torch.randn(256, 3), torch.randn(1, 3)])
    torch.testing.assert_close(model.layer.bias, reference.layer.bias, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_reached_keep_their_biases() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.left = nn.Linear(3, 3), nn.Linear(3, 3), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) if self.left else self.second(x)

    reference, model = Routed(), Routed()
    model.left = False
    assert correct_biases(model, reference, torch.randn(20, 3)) == []
