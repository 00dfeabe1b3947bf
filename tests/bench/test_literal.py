"""The source material's formulas, written out literally in `bench/literal.py`, against bitbook's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import literal
from bitbook import Activation, Binary, Codebook, FitOptions, Plan, Quantizer, Training, Uniform, quantize_
from bitbook.data import Dataset
from bitbook.data.mnist import pixels
from bitbook.loop import evaluate, run_epochs
from bitbook.models import build_model
from bitbook.vector.kmeans import kmeans

ROWS = (1, -1)
SIZES = (64, 32, 16, 10)
MODEL = "mlp-64-32-16-10"


def scalar(bits: int) -> Quantizer:
    return Binary() if bits == 1 else Uniform(bits)


def literal_copy(model: nn.Module) -> literal.Network:
    network = literal.Network(SIZES)
    network.load_state_dict(model.state_dict())
    return network


def batches(data: Dataset, count: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.train_x.split(64), data.train_y.split(64), strict=True))[:count]


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> nn.Module:
    """A float MLP trained on digits; shared, so to be copied before it is changed."""
    model = build_model(MODEL, seed=0)
    run_epochs(model, digits.train_x, digits.train_y, Training(20, 0.1), generator=torch.Generator().manual_seed(0))
    return model


# -- data ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 28, 28), (3, 5, 7), (1, 16, 16)])
def test_transforms_equal_ours_bit_for_bit(shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images[0].flat[:] = np.arange(images[0].size) % 256  # every value there is, where it fits
    data = literal.Images(images, torch.zeros(len(images), dtype=torch.int64))
    assert torch.equal(torch.stack([data[i][0].flatten() for i in range(len(data))]), pixels(images))


def test_transforms_equal_the_pixels_of_mnist_bit_for_bit(mnist: Dataset) -> None:
    some = mnist.train_x[torch.randperm(len(mnist.train_x), generator=torch.Generator().manual_seed(0))[:100]]
    images = (some + 1).mul(127.5).round().to(torch.uint8).view(-1, 28, 28).numpy()
    data = literal.Images(images, torch.zeros(100, dtype=torch.int64))
    assert torch.equal(torch.stack([data[i][0].flatten() for i in range(100)]), some)


def test_loader_gives_every_image_once_in_batches_of_64() -> None:
    images = np.arange(150, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    loader = literal.loader(images, torch.arange(150), shuffle=True)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [64, 64, 22]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(150))
    for x, y in batches:
        assert torch.equal(x.flatten(1), pixels(images)[y])


# -- scalar ----------------------------------------------------------------------------------------------
def outputs_and_gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = model(x)
    # Sums instead of means make some one-bit gradients larger than 1, so that their clipping shows.
    nn.functional.cross_entropy(logits, y, reduction="sum").backward()
    gradients = {p.shape: p.grad for p in model.parameters()}  # the two models name their parameters differently
    assert all(gradient is not None for gradient in gradients.values())
    return logits.detach(), [gradients[shape] for shape in sorted(gradients)]  # type: ignore[misc]


@pytest.mark.parametrize("act_bits", [None, 8, 4, 1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_scalar_forward_and_gradient(bits: int, act_bits: int | None, digits: Dataset, trained: nn.Module) -> None:
    ours, theirs = copy.deepcopy(trained), literal_copy(trained)
    # sign(0) is 0 in the source and +1 here; a nudge keeps inputs off zero. ReLU makes exact zeros, so
    # where inputs are binary only the first layer's are.
    x, y = digits.train_x[:32] + 1e-3, digits.train_y[:32]
    quantized = ("fc1",) if act_bits == 1 else ("fc1", "fc2", "fc3")
    inputs = {} if act_bits is None else {name: Activation(scalar(act_bits)) for name in quantized}
    quantize_(ours, Plan({"*.weight": scalar(bits)}, inputs))
    for name, layer in list(theirs.named_children()):
        assert isinstance(layer, nn.Linear)
        setattr(theirs, name, literal.QuantizedLinear(layer, bits, act_bits if name in quantized else None))
    logits, gradients = outputs_and_gradients(ours, x, y)
    expected, expected_gradients = outputs_and_gradients(theirs, x, y)
    # Equal bits but for one, where the mean is summed in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_one_bit_in_the_revision() -> None:
    w = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)) + 0.2
    w[0, 0] = 4.0  # beyond s = (max - min) / 2, where the gradient must stop
    grad = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)) * 3
    layer = nn.Linear(7, 9, bias=False)
    layer.weight.data = w.clone()
    plan = Plan({"weight": Binary()})
    quantize_(layer, plan, options=FitOptions(range="minmax"))
    theirs = w.clone().requires_grad_()
    expected = literal.Quantize.apply(theirs, 1, True)
    expected.backward(grad)
    layer.weight.backward(grad)
    assert torch.equal(layer.weight, expected)
    (latent,) = layer.parameters()
    assert latent.grad is not None and theirs.grad is not None
    assert torch.equal(latent.grad, theirs.grad)
    assert latent.grad[0, 0] == 0


@pytest.mark.parametrize(("bits", "act_bits"), [(4, 4), (2, None), (1, None)])
def test_a_few_steps_of_training(bits: int, act_bits: int | None, digits: Dataset, trained: nn.Module) -> None:
    ours, theirs = copy.deepcopy(trained), literal_copy(trained)
    activation = None if act_bits is None else Activation(scalar(act_bits))
    quantize_(ours, Plan({"*.weight": scalar(bits)}, {"fc*": activation}))
    literal.replace_layers(theirs, lambda layer: literal.QuantizedLinear(layer, bits, act_bits))
    some = batches(digits, 8)
    expected = literal.train(theirs, some, lr=1e-2, epochs=1)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    loss = literal.train_epoch(ours, some, optimizer)
    assert [loss] == pytest.approx(expected, rel=1e-4)
    for mine, name in ((ours.fc1, "fc1"), (ours.fc3, "fc3")):  # type: ignore[union-attr]
        (latent,) = [p for p in mine.parameters() if p.dim() == 2]
        torch.testing.assert_close(latent, getattr(theirs, name).weight, rtol=1e-4, atol=1e-5)


def test_our_training_loop_is_the_literal_one(digits: Dataset) -> None:
    ours = build_model(MODEL, seed=0)
    theirs = literal_copy(ours)
    order = torch.randperm(len(digits.train_x), generator=torch.Generator().manual_seed(5))
    loaded = [(digits.train_x[batch], digits.train_y[batch]) for batch in order.split(64)]
    generator = torch.Generator().manual_seed(5)
    losses = run_epochs(ours, digits.train_x, digits.train_y, Training(1, 0.1), generator=generator)
    assert losses == pytest.approx(literal.train(theirs, loaded, lr=0.1, epochs=1), rel=1e-5)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-4, atol=1e-6)
    tests = list(zip(digits.test_x.split(64), digits.test_y.split(64), strict=True))
    accuracy = evaluate(ours, digits.test_x, digits.test_y).accuracy
    assert literal.accuracy(theirs, tests) == pytest.approx(accuracy, abs=0.5)


# -- vector ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("percent", [10, 25, 50, 90])
def test_row_clusters_are_no_worse(percent: int, trained: nn.Module) -> None:
    """Ten restarts of either differ by 2 % from seed to seed on so few rows, so ours get more of them."""
    for name, layer in literal_copy(trained).named_children():
        assert isinstance(layer, nn.Linear)
        theirs = literal.ClusteredLinear(layer, percent)
        rows, k = layer.weight.detach(), len(theirs.centroids)
        assert k == Codebook(percent / 100, ROWS).resolve(tuple(rows.shape)).size
        ours = kmeans(rows, k, restarts=500, generator=torch.Generator().manual_seed(0))
        assert ours.inertia <= theirs.inertia * (1 + 1e-3), name


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_steps_of_clustered_training_with_the_same_clusters(
    bits: int | None, digits: Dataset, trained: nn.Module
) -> None:
    """Centroids, fused or not, and biases take the same steps once both start from the same clusters."""
    ours, theirs = copy.deepcopy(trained), literal_copy(trained)
    literal.replace_layers(theirs, lambda layer: literal.ClusteredLinear(layer, 50, bits))
    centroids = Uniform(bits) if bits is not None else None
    recipe = Codebook(0.5, ROWS) if centroids is None else Codebook(0.5, ROWS, centroids)
    quantize_(ours, Plan({"*.weight": recipe}), generator=torch.Generator().manual_seed(0))
    for name in ("fc1", "fc2", "fc3"):
        take_clusters(getattr(ours, name).slots.weight, getattr(theirs, name))
    some = batches(digits, 8)
    torch.testing.assert_close(ours(some[0][0]), theirs(some[0][0]), rtol=1e-5, atol=1e-5)
    expected = literal.train(theirs, some, lr=1e-2, epochs=1)
    loss = literal.train_epoch(ours, some, torch.optim.SGD(ours.parameters(), lr=1e-2))
    assert [loss] == pytest.approx(expected, rel=1e-4)
    for name in ("fc1", "fc2", "fc3"):
        latent = getattr(ours, name).slots.weight.side.centroids.latent
        torch.testing.assert_close(latent, getattr(theirs, name).centroids, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(getattr(ours, name).bias, getattr(theirs, name).bias, rtol=1e-4, atol=1e-5)


def take_clusters(source: nn.Module, layer: literal.ClusteredLinear) -> None:
    """Give a `FakeQuantize` of rows the clusters of a literal layer."""
    assert isinstance(layer.labels, Tensor)
    source.recipe = Codebook(len(layer.centroids), ROWS, source.recipe.centroids)  # type: ignore[union-attr,assignment]
    source.side.centroids.latent = nn.Parameter(layer.centroids.detach().clone())  # type: ignore[union-attr]
    source.codes_codes = layer.labels.to(torch.uint8)[:, None]
