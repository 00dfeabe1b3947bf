from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitbook import Codebook, FakeQuantize, Regime, Uniform
from bitbook.errors import PlanError
from bitbook.vector import soft
from bitbook.vector.soft import soft_codewords


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(x: Tensor, c: Tensor, temperature: float, weights: Tensor | None) -> Tensor:
    """The formula, with every difference of every pair held at once."""
    square = (x[:, None] - c).square()
    distance = (square if weights is None else square * weights[:, None]).sum(2)
    return (-distance / temperature).softmax(1) @ c


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_values_and_gradients_are_those_of_the_dense_formula(
    weighted: bool, chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft, "CHUNK", chunk)
    weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(5)).double() if weighted else None
    results = []
    for function in (soft_codewords, dense):
        x, c = gauss(40, 3).requires_grad_(), gauss(7, 3, seed=1).requires_grad_()
        value = function(x, c, temperature, weights)
        (value * gauss(40, 3, seed=2)).sum().backward()
        results.append((value, x.grad, c.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_does_not_grow_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft, "CHUNK", 4096)
    for n in (1_000, 16_000):
        x, c = gauss(n, 2).requires_grad_(), gauss(64, 2, seed=1).requires_grad_()
        with Largest() as largest:
            soft_codewords(x, c, 0.1).sum().backward()
        assert largest.elements <= max(4096, 2 * n)  # of n · 64


def source(regime: Regime, recipe: Codebook = Codebook(8, (1, 4)), shape: tuple[int, int] = (16, 16)) -> FakeQuantize:
    w = gauss(*shape).float()
    return FakeQuantize(recipe, nn.Parameter(w), regime=regime, generator=torch.Generator().manual_seed(0))


def test_training_is_soft_and_the_file_is_hard() -> None:
    fake = source(Regime(codes="soft"))
    mixed = fake().detach()
    assert mixed.unique(dim=0).shape[0] == 16 and not torch.equal(mixed, fake.freeze().decode())
    fake.eval()
    assert torch.equal(fake(), fake.freeze().decode())
    twin = copy.deepcopy(fake).train()
    assert torch.equal(twin(), mixed)
    fake.train()().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fake.parameters())
    assert [name for name, _ in fake.named_parameters()] == ["latent", "side.centroids.latent"]


def test_cold_codes_are_hard() -> None:
    fake = source(Regime(codes="soft", temperature=1e-4))
    gap = (fake() - fake.freeze().decode()).abs()
    assert (gap < 1e-5).float().mean() > 0.95  # all but blocks halfway between two codewords


def test_padding_weighs_nothing() -> None:
    fake = source(Regime(codes="soft"), Codebook(3, (1, 4), pad=True), (8, 7))
    before = fake().detach().clone()
    codewords = fake.side.centroids.latent
    fake().square().sum().backward()
    assert codewords.grad.isfinite().all() and before.shape == (8, 7)


def test_soft_training_lowers_a_loss_and_more_so_than_frozen_codes() -> None:
    target = gauss(16, 16, seed=3).float()
    losses = []
    for codes in ("soft", "frozen"):
        fake = source(Regime(codes=codes), Codebook(8, (1, 4), centroids=Uniform(6)))
        optimizer = torch.optim.Adam(fake.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            (fake() - target).square().mean().backward()
            optimizer.step()
        losses.append((fake.eval()().detach() - target).square().mean().item())
    assert losses[0] < 0.8 * losses[1]


def test_as_many_codewords_as_blocks() -> None:
    fake = source(Regime(codes="soft"), Codebook(64, (1, 4)))
    fake().square().sum().backward()
    assert fake().isfinite().all() and all(p.grad.isfinite().all() for p in fake.parameters())


def test_refusals() -> None:
    with pytest.raises(PlanError, match="no soft codes; use a Codebook"):
        FakeQuantize(Uniform(4), nn.Parameter(torch.ones(4, 4)), regime=Regime(codes="soft"))
    with pytest.raises(PlanError, match="leave reassign_every at 1"):
        Regime(codes="soft", reassign_every=2)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="positive multiple"):
            Regime(codes="soft", temperature=temperature)
