from __future__ import annotations

import pytest
import torch

from bitbook import ECSQ, Codebook, FakeQuantize, Residual, Rotated, SignMagnitude, Uniform, quantize
from bitbook.errors import PlanError


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inner", [Uniform(3, symmetric=False), Codebook(8, (1, 4)), ECSQ(2)], ids=repr)
def test_magnitudes_are_the_inner_quantizers(inner) -> None:  # type: ignore[no-untyped-def]
    w = weights(8, 8)
    q = quantize(SignMagnitude(inner), w, generator=torch.Generator().manual_seed(0))
    size = quantize(inner, w.abs(), generator=torch.Generator().manual_seed(0)).decode()
    assert torch.equal(q.decode(), torch.where((w < 0) & (size > 0), -size, size))
    assert torch.equal(q.codes["signs"].bool(), (w < 0) & (size > 0))
    assert [s.spec.name for s in q.streams()][-1] == "signs"


def test_a_zero_has_no_sign() -> None:
    q = quantize(SignMagnitude(Uniform(2, symmetric=False)), torch.tensor([[-0.01, -1.0, 0.01, 1.0]]))
    assert q.codes["signs"].tolist() == [[0, 1, 0, 0]]
    assert q.decode().tolist() == [[0, -1, 0, 1]] and not torch.signbit(q.decode()[0, 0])


def test_one_codeword_of_magnitudes_serves_all_signs() -> None:
    """1 + 8/4 bits per weight either way; the sign's structure is what Gaussian vectors have."""
    w = weights(64, 64)
    split, whole = (
        (quantize(recipe, w, generator=torch.Generator().manual_seed(0)).decode() - w).square().mean()
        for recipe in (SignMagnitude(Codebook(16, (1, 4))), Codebook(16, (1, 4)))
    )
    assert split < whole


def test_it_trains_as_the_inner_one_does() -> None:
    for inner in (Uniform(3, symmetric=False), Codebook(4)):
        own = FakeQuantize(SignMagnitude(inner), torch.nn.Parameter(weights(8, 8)))
        names = [name for name, _ in FakeQuantize(inner, torch.nn.Parameter(weights(8, 8))).named_parameters()]
        assert [name for name, _ in own.named_parameters()] == names
    assert not SignMagnitude(Residual((Codebook(4), Codebook(4)))).idempotent


@pytest.mark.parametrize("inner", [4, SignMagnitude(Uniform(4)), Rotated(SignMagnitude(Uniform(4)))], ids=repr)
def test_refusals(inner) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match="quantizer of magnitudes"):
        SignMagnitude(inner)
