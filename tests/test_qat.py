from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from bitbook import Codebook, FakeQuantize, FitOptions, Pruned, Regime, Ternary, Uniform, quantize
from bitbook.errors import PlanError, WeightError


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def source(recipe, w: Tensor, **arguments) -> FakeQuantize:  # type: ignore[no-untyped-def]
    return FakeQuantize(recipe, nn.Parameter(w.clone()), generator=generator(), **arguments)


@pytest.mark.parametrize(
    "recipe",
    [Uniform(4), Uniform(4, (1, 4), scale=Uniform(8)), Ternary(), Codebook(4, centroids=Uniform(5)), Pruned(0.5)],
    ids=repr,
)
@pytest.mark.parametrize("frozen", [False, True])
def test_before_any_training_it_is_what_quantize_gives(recipe, frozen: bool) -> None:  # type: ignore[no-untyped-def]
    w = weights(8, 8)
    regime = Regime(codes="frozen") if frozen else Regime()
    fake = source(recipe, w, regime=regime)
    expected = quantize(recipe, w, generator=generator())
    assert torch.equal(fake(), expected.decode())
    assert fake.freeze().recipe == expected.recipe == fake.recipe


def test_the_parameter_itself_trains_on() -> None:
    weight = nn.Parameter(weights(4, 4))
    fake = FakeQuantize(Uniform(4), weight)
    assert fake.latent is weight and list(fake.parameters()) == [weight]
    assert not list(FakeQuantize(Uniform(4), weights(4, 4)).parameters())


def test_what_each_regime_trains() -> None:
    def trained(recipe, regime: Regime) -> list[str]:  # type: ignore[no-untyped-def]
        return [name for name, _ in source(recipe, weights(4, 8), regime=regime).named_parameters()]

    nested = Uniform(4, (1, 4), symmetric=False, scale=Uniform(8))
    assert trained(nested, Regime()) == ["latent"]
    assert trained(nested, Regime(side="learned")) == ["latent", "side.scale.latent"]
    assert trained(nested, Regime(codes="frozen")) == ["side.scale.latent"]
    assert trained(Codebook(4), Regime()) == ["side.centroids.latent"]
    assert trained(Codebook(4), Regime(codes="latent")) == ["latent", "side.centroids.latent"]
    assert trained(Codebook(4), Regime(codes="latent", side="refreshed")) == ["latent"]


def test_latent_codebooks_pass_the_gradient_straight_through() -> None:
    fake = source(Codebook(4), weights(4, 8), regime=Regime(codes="latent"))
    direction = weights(4, 8, seed=1)
    (fake() * direction).sum().backward()
    assert torch.equal(fake.latent.grad, direction)
    labels = fake.freeze().codes["codes"].flatten().long()
    expected = torch.zeros(4, 4).index_add(0, labels, direction.reshape(8, 4))
    assert torch.allclose(fake.side.centroids.latent.grad, expected, atol=1e-6)


def test_assignments_are_renewed_every_so_often() -> None:
    fake = source(Codebook(4), weights(4, 8), regime=Regime(codes="latent", reassign_every=3))
    seen = []
    for step in range(7):
        with torch.no_grad():
            fake.latent.copy_(weights(4, 8, seed=step))
        fake()
        seen.append(fake.codes["codes"].clone())
    renewed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert renewed == [False, False, True, False, False, True]
    kept = fake.codes["codes"].clone()
    fake.eval()
    with torch.no_grad():
        fake.latent.copy_(weights(4, 8, seed=99))
    for _ in range(5):
        fake()
    assert torch.equal(fake.codes["codes"], kept)  # evaluation renews nothing
    assert torch.equal(fake.freeze().decode(), fake())


def test_k_means_never_runs_inside_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = source(Codebook(4, centroids=Uniform(4)), weights(8, 8), regime=Regime(codes="latent"))
    monkeypatch.setattr("bitbook.vector.codebook.kmeans", lambda *a, **k: pytest.fail("k-means ran"))
    for _ in range(3):
        fake().sum().backward()
    fake.freeze()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_weights_own_type_comes_back(dtype: torch.dtype) -> None:
    for recipe in (Uniform(4), Codebook(4)):
        born = FakeQuantize(recipe, nn.Parameter(weights(4, 8).to(dtype)), generator=generator())
        cast = source(recipe, weights(4, 8)).to(dtype)
        for fake in (born, cast):
            assert fake().dtype == dtype
            assert torch.equal(fake(), fake.freeze().decode().to(dtype))
            fake().sum().backward()


def test_casting_keeps_scales_that_half_precision_would_lose() -> None:
    fake = source(Uniform(4), weights(4, 8) * 1e-4).half()
    assert fake.freeze().side["scale"].decode().item() > 0
    assert fake().unique().numel() > 3


def test_copies_are_independent() -> None:
    fake = source(Uniform(4), weights(4, 4))
    twin = copy.deepcopy(fake)
    before = fake().detach().clone()
    with torch.no_grad():
        twin.latent.zero_()
        twin()
    assert torch.equal(fake(), before)


def test_freezing_does_not_change_training() -> None:
    one, two = (source(Uniform(3, (1, 4)), weights(4, 8)) for _ in range(2))
    for fake, freezes in ((one, False), (two, True)):
        optimizer = torch.optim.SGD(fake.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (fake() ** 2).sum().backward()
            optimizer.step()
            if freezes:
                fake.freeze()
    assert torch.equal(one(), two())


def test_the_mse_range_stands_still_between_fits() -> None:
    fake = source(Uniform(3), weights(8, 8), options=FitOptions(range="mse"))
    scale = fake.side.scale().clone()
    with torch.no_grad():
        fake.latent.mul_(10)
    fake()
    assert torch.equal(fake.side.scale(), scale)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="use side='learned'"):
        Regime(codes="frozen", side="refreshed")
    with pytest.raises(PlanError, match="1 or more"):
        Regime(reassign_every=0)
    with pytest.raises(WeightError, match=r"value at \(1, 0\) is nan"):
        source(Uniform(4), torch.tensor([[1.0, 2.0], [math.nan, 1.0]]))
    fake = source(Uniform(4), weights(2, 2))
    with torch.no_grad():
        fake.latent[1, 1] = math.inf
    with pytest.raises(WeightError, match=r"value at \(1, 1\) is inf"):
        fake.freeze()
