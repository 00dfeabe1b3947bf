from __future__ import annotations

import copy

import pytest
import torch
from torch import Generator, Tensor, nn

from bitbook import ECSQ, Float, Plan, Uniform, compress, dequantize_, evaluate, load, quantize_, save
from bitbook.errors import PlanError
from bitbook.loop import Training, run_epochs
from bitbook.surgery.batchnorm import SMALLEST_SHARE, absorb_statistics, fixed_statistics, fold_, shift_statistics


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


# -- folding -----------------------------------------------------------------------------------
def lived(model: nn.Module, x: Tensor) -> nn.Module:
    """A model whose normalisations have weights, biases and statistics of some size."""
    generator = Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                if value is not None:
                    value.data.copy_(0.5 + torch.rand(value.shape, generator=generator))
            if module.weight is not None:
                module.weight.data[0] *= -1
    return model.eval()


FOLDABLE = [
    (lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)], (5, 4, 7, 7)),
    (lambda: [nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.BatchNorm2d(8, affine=False)], (5, 4, 7, 7)),
    (lambda: [nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(6)], (5, 4, 7)),
    (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (3, 2, 4, 4, 4)),
    (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)], (5, 4, 7, 7)),
    (lambda: [nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)], (5, 4, 7)),
    (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (5, 4)),
]


@pytest.mark.parametrize(("make", "shape"), FOLDABLE)
def test_a_normalisation_is_folded_into_the_layer_before_it(make: object, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=Generator().manual_seed(0))
    model = lived(nn.Sequential(*make(), nn.ReLU()), x)  # type: ignore[operator]
    expected = model(x)
    model.train()
    found = fold_(model, x)
    assert model.training and isinstance(model[1], nn.Identity) and model[1].training
    assert dict(found.folded) == {"1": "0"} and not found.kept
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model[0].bias.requires_grad


def test_what_feeds_what_is_seen_not_guessed() -> None:
    """A normalisation stays where its input is used elsewhere, too, or comes from elsewhere; and the reason is told."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # In an order, and under names, that say nothing.
            self.bn = nn.ModuleDict({k: nn.BatchNorm2d(4) for k in "abcdefgh"})
            self.by = nn.ModuleDict({k: nn.Conv2d(4, 4, 1) for k in "gfedcba"})
            self.batch = nn.BatchNorm2d(4, track_running_stats=False)
            self.rows = nn.Linear(4, 4)
            self.late = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            x = self.bn["a"](self.by["a"](x))  # folds
            y = self.by["b"](x)
            x = self.bn["b"](y) + y  # also used by an addition
            y = self.by["c"](x)
            assert y.shape[1] == 4 and y.dim() == 4  # looking is no use
            x = self.bn["c"](y)  # folds
            x = self.bn["d"](x.relu())  # no layer before it
            y = self.by["d"](x)
            x = self.bn["e"](y)  # y is returned
            x = self.bn["f"](self.by["e"](self.by["e"](x)))  # a weight used twice
            x = self.bn["g"](self.by["f"](x).relu_())
            x = self.bn["g"](self.by["g"](x))  # used twice
            x = self.batch(x)
            z = self.late(self.rows(x.flatten(2).mT).mT)  # linear outputs lie along another axis
            return z, {"more": y}

    x = torch.randn(3, 4, 5, 5, generator=Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lived(Net(), x)
    expected = model(x)
    found = fold_(model, [x])
    assert dict(found.folded) == {"bn.a": "by.a", "bn.c": "by.c"}
    reasons = {
        "bn.b": "the output of by.b is also used by add",
        "bn.d": "what it normalises is no output",
        "bn.e": "the output of by.d is also used by the model's result",
        "bn.f": "the weight of by.e is used several times",
        "bn.g": "it is used several times",
        "bn.h": "no input reaches it",
        "batch": "it keeps no statistics",
        "late": "what it normalises is no output",
    }
    assert set(found.kept) == set(reasons)
    for name, reason in reasons.items():
        assert reason in found.kept[name], name
    assert "bn.a: folded into by.a" in str(found) and "bn.h: kept, no input reaches it" in str(found)
    for a, b in zip([model(x)[0], *model(x)[1].values()], [expected[0], *expected[1].values()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_shared_and_tied_layers_are_not_folded() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    x = torch.randn(9, 4, generator=Generator().manual_seed(0))
    model = lived(nn.Sequential(one, nn.BatchNorm1d(4), two), x)
    assert "the weight of 0 is used several times" in fold_(model, x).kept["1"]
    shared = nn.Linear(4, 4)
    model = lived(nn.Sequential(shared, nn.BatchNorm1d(4), shared, nn.BatchNorm1d(4)), x)
    assert not fold_(model, x).folded
    both = nn.BatchNorm1d(4)
    model = lived(nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), both), "b": both})["a"], x)
    expected = model(x)
    assert fold_(model, x).folded and both not in list(model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="no inputs to see what feeds what"):
        fold_(model, [])


def test_a_way_that_depends_on_the_inputs_is_seen_on_all_of_them() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor, way: str) -> Tensor:
            y = self.layer(x)
            return self.norm(y) if way == "a" else self.other(y) if way == "b" else y

    x = torch.randn(6, 4, generator=Generator().manual_seed(0))
    for ways, reason in (("ab", "layer is also used without it"), ("ca", "layer is also used without it"), ("a", "")):
        model = lived(Forks(), x)
        found = fold_(model, [{"x": x, "way": way} for way in ways])
        assert bool(found.folded) is not bool(reason) and reason in str(found.kept.get("norm", ""))


def test_a_folded_network_is_stored_in_less_and_loads_into_a_folded_one(
    network: nn.Module, images: Tensor, tmp_path: object
) -> None:
    plan = Plan({"*.weight": ECSQ(), "*": Float("bfloat16")})
    folded, fresh = copy.deepcopy(network), copy.deepcopy(network)
    found = fold_(folded, images)
    assert dict(found.folded) == {"1": "0", "4": "3", "9": "8"}
    torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-4)
    sizes = [
        save(compress(model, plan), f"{tmp_path}/{i}.safetensors").total for i, model in enumerate((network, folded))
    ]
    assert sizes[1] < sizes[0]
    for value in fresh.parameters():
        nn.init.normal_(value)
    fold_(fresh, images[:2])
    loaded = load(f"{tmp_path}/1.safetensors", fresh)
    assert (loaded(images) - network(images)).square().mean() < network(images).var()
