from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bitbook.errors import PlanError
from bitbook.models import MLP, MODELS, build_model, mlp

FEATURES = {name: 64 if "-64-32" in name else 3072 if "resnet" in name else 784 for name in MODELS}


def state(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp-784-128-64-10", 109_386),
        ("mlp-64-32-16-10", 2_778),
        ("lenet-300-100", 266_610),
        ("lenet-5", 431_080),
        ("lenet-5-20-50-500", 431_080),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in build_model(name, seed=0).parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_a_gradient_for_every_parameter(name: str, generator: torch.Generator) -> None:
    model = build_model(name, seed=0)
    x = torch.rand(5, FEATURES[name], generator=generator)
    logits = model(x)
    assert logits.shape == (5, 10)
    F.cross_entropy(logits, torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["lenet-5", "lenet-300-100"])
def test_images_need_not_be_flattened(name: str, generator: torch.Generator) -> None:
    model = build_model(name, seed=0)
    x = torch.rand(3, 1, 28, 28, generator=generator)
    assert torch.equal(model(x), model(x.flatten(1)))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_mlp_is_linear_layers_with_relu_between(sizes: list[int]) -> None:
    model = build_model("mlp-" + "-".join(map(str, sizes)), seed=0)
    assert isinstance(model, MLP)
    names = [f"fc{i}.{kind}" for i in range(1, len(sizes)) for kind in ("weight", "bias")]
    assert list(model.state_dict()) == names
    expected = x = torch.randn(4, sizes[0], generator=torch.Generator().manual_seed(0))
    for weight, bias in zip(state(model)[::2], state(model)[1::2], strict=True):
        expected = x @ weight.T + bias
        x = expected.clamp(min=0)
    assert [w.shape for w in state(model)[::2]] == [(b, a) for a, b in pairwise(sizes)]
    torch.testing.assert_close(model(torch.randn(4, sizes[0], generator=torch.Generator().manual_seed(0))), expected)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model("lenet-300-100", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again, other = build_model("lenet-300-100", seed=5), build_model("lenet-300-100", seed=6)
    assert all(torch.equal(a, b) for a, b in zip(state(first), state(again), strict=True))
    assert not torch.equal(state(first)[0], state(other)[0])


@pytest.mark.parametrize("name", ["lenet-4", "mlp", "mlp-784", "mlp-784--10", "mlp-784-0", "mlp-784-10-", "lenet-5-8"])
def test_an_unknown_name_gets_the_choices(name: str) -> None:
    with pytest.raises(PlanError, match=f"no model '{name}'; there are mlp-784-128-64-10, .* mlp-A-B-…"):
        build_model(name, seed=0)


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2)])
def test_mlp_says_which_sizes_it_takes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="two or more sizes of at least 1"):
        mlp(sizes)
