from __future__ import annotations

import copy

import pytest
import torch
from torch import Generator, Tensor, nn

from bitbook import Float, Plan, Uniform, dequantize_, evaluate, quantize_
from bitbook.batchnorm import SMALLEST_SHARE, absorb_statistics, fixed_statistics, shift_statistics
from bitbook.errors import PlanError
from bitbook.loop import Training, run_epochs


@pytest.fixture
def network(generator: Generator) -> nn.Module:
    """A convolutional network with statistics that belong to images of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 16, 16), nn.BatchNorm1d(16),
            nn.Linear(16, 4),
        )  # fmt: skip
        for _ in range(30):
            model(1 + 2 * torch.randn(64, 3, 8, 8, generator=generator))
    return model.eval()


@pytest.fixture
def images(generator: Generator) -> Tensor:
    return 1 + 2 * torch.randn(300, 3, 8, 8, generator=generator)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_model_that_equals_its_reference_stays_as_it_is(network: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(network)
    model[1].train()
    shift_statistics(model, network, images * 0.3)  # images of another kind: a new estimate would be off
    assert same(model, network)
    assert model[1].training and not model[4].training and not network.training


def test_scaled_weights_are_undone(network: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(network)
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0.8, 1.4, 8).reshape(-1, 1, 1, 1))
    broken = (model(images) - network(images)).abs().mean()
    shift_statistics(model, network, images)
    assert (model(images) - network(images)).abs().mean() < 0.05 * broken


def test_coarse_weights_are_helped(network: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(network)
    quantize_(
        model, Plan({"?.weight": Uniform(2), "8.weight": Float()}), lambda module, _: isinstance(module, nn.Conv2d)
    )
    plain = dequantize_(copy.deepcopy(model))
    broken = (model(images) - network(images)).square().mean()
    shift_statistics(model, network, images)  # with slots
    shift_statistics(plain, network, images)  # or without
    repaired = (model(images) - network(images)).square().mean()
    assert repaired < 0.7 * broken
    assert torch.equal(plain(images), model(images))


def test_a_dead_channel_keeps_some_variance(network: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(network)
    nn.init.zeros_(model[0].weight)
    before = network[1].running_var.clone()
    shift_statistics(model, network, images)
    assert torch.equal(model[1].running_var, SMALLEST_SHARE * before)
    assert model(images).isfinite().all()


def test_statistics_are_absorbed(network: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(network)
    absorb_statistics(model)
    torch.testing.assert_close(model(images), network(images), rtol=1e-4, atol=1e-5)
    for layer in (model[1], model[4], model[9]):
        assert not layer.running_mean.any() and torch.equal(layer.running_var, torch.ones(layer.num_features))
    again = copy.deepcopy(model)
    absorb_statistics(again)
    assert all(
        torch.allclose(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_statistics_stay_while_training(network: nn.Module, images: Tensor, generator: Generator) -> None:
    model = copy.deepcopy(network)
    labels = torch.arange(len(images)) % 4
    with fixed_statistics(model):
        run_epochs(model, images, labels, Training(1, 1e-3, 64), generator=generator)
    for name, value in network.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == ("running" in name or "tracked" in name), name
    run_epochs(model, images, labels, Training(1, 1e-3, 64), generator=generator)
    assert not torch.equal(network[1].running_mean, model[1].running_mean)
    assert evaluate(model, images, labels).loss > 0


def test_errors(network: nn.Module, images: Tensor) -> None:
    with pytest.raises(PlanError, match="there are none"):
        shift_statistics(network, network, images[:0])
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(PlanError, match="differ in their normalisations 1, 4, 9"):
        shift_statistics(network, other, images)
    with pytest.raises(PlanError, match="0 has no weight and bias"):
        absorb_statistics(nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    shift_statistics(plain, copy.deepcopy(plain), images)  # nothing to do
    absorb_statistics(plain)


def test_constant_channels_leave_the_others_their_scale(network: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        network[0].weight[2:4] = 0
        network[1].running_mean[2:4] = 0
        network[1].running_var[2:4] = 0
    before = network(images)
    absorb_statistics(network)
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-4)
    assert not network[1].weight[2:4].any() and network[1].weight.abs().max() < 10
