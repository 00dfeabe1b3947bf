from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbook import Binary, Codebook, FakeQuantize, Pruned, Quantizer, Uniform, quantize
from bitbook.errors import CorruptArtifact, PlanError


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_the_largest_weights_are_kept_exactly(keep: int, seed: int) -> None:
    w = weights(5, 6, seed=seed)
    order = sorted(range(30), key=lambda i: -abs(w.flatten()[i].item()))
    expected = torch.zeros(30)
    for i in order[:keep]:
        expected[i] = w.flatten()[i]
    assert torch.equal(quantize(Pruned(keep), w).decode().flatten(), expected)


def test_a_fraction_is_rounded_down_and_at_least_one() -> None:
    assert [Pruned(f).resolve((10, 10)).keep for f in (0.29, 0.5, 1.0, 1e-6)] == [29, 50, 100, 1]


def test_importance_chooses_what_is_kept() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    importance = torch.tensor([[100.0, 1.0, 1.0, 1.0]])
    assert quantize(Pruned(2), w, importance=importance).decode().tolist() == [[1.0, 0.0, 0.0, 4.0]]


@pytest.mark.parametrize("importance", [None, weights(32, 32, seed=9).square()])
@pytest.mark.parametrize("values", [Uniform(3), Uniform(3, (1, 8), pad=True), Codebook(4, (1, 1))], ids=repr)
def test_every_kept_value_stays_at_its_place(values: Quantizer, importance: Tensor | None) -> None:
    """Values that are stored as zero leave the mask, and the others do not move because of that."""
    w = weights(32, 32)
    w[:16] *= 10
    q = quantize(Pruned(0.5, values), w, importance=importance, generator=torch.Generator().manual_seed(0))
    kept = q.codes["mask"].reshape(w.shape).bool()
    stored = q.side["values"]
    again = stored.recipe.decode(  # what its quantizer makes of exactly the weights under the mask
        stored.recipe.encode(w[kept], {n: s.decode() for n, s in stored.side.items()}),
        {n: s.decode() for n, s in stored.side.items()},
        stored.shape,
    )
    assert torch.equal(q.decode()[kept], again)
    assert not q.decode()[~kept].any()


def test_what_would_be_stored_as_zero_is_not_kept() -> None:
    q = quantize(Pruned(1.0, Uniform(2)), weights(16, 16))
    assert q.decode()[q.codes["mask"].bool()].all()
    assert q.recipe.keep < 256


def test_training_keeps_the_mask_and_moves_the_values() -> None:
    w = weights(6, 6)
    source = FakeQuantize(Pruned(0.25), nn.Parameter(w))
    mask = source().detach() != 0
    direction = weights(6, 6, seed=1)
    (source() * direction).sum().backward()
    assert torch.equal(source.side.values.latent.grad, direction[mask])
    assert source.side.values.latent.numel() == 9 == mask.sum()


def test_refusals() -> None:
    for keep in (0, -1, 0.0, 1.5, True, "half"):
        with pytest.raises(PlanError, match="whole number of weights"):
            Pruned(keep)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="of 4 weights: use at most 4"):
        quantize(Pruned(5), torch.ones(2, 2))
    with pytest.raises(PlanError, match="resolve"):
        Pruned(0.5).children((2, 2))
    q = quantize(Pruned(2, Binary()), weights(2, 2))
    with pytest.raises(CorruptArtifact, match="mask of 4 weights stands beside 2"):
        q.recipe.decode({"mask": torch.ones(2, 2)}, {"values": torch.ones(2)}, (2, 2))
