from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitbook import Codebook, FitOptions, GainShape, Uniform, quantize
from bitbook.blocks import Grid
from bitbook.errors import PlanError


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_each_block_is_its_gain_times_the_nearest_shape() -> None:
    w = weights(16, 16)
    q = quantize(GainShape(8, (1, 4), gains=Uniform(5, symmetric=False)), w, generator=generator())
    shapes, gains = q.side["centroids"].decode(), q.side["gains"].decode().flatten()
    assert torch.allclose(shapes.norm(dim=1), torch.ones(8), atol=1e-6)
    blocks = Grid.of((16, 16), (1, 4)).split(w).double()
    for block, gain, code in zip(blocks, gains, q.codes["codes"].flatten().tolist(), strict=True):
        errors = (block - gain.double() * shapes.double()).square().sum(1)
        assert errors[code] == pytest.approx(errors.min().item(), rel=1e-5)


def test_exact_gains_leave_what_the_angle_leaves() -> None:
    w = weights(16, 16)
    q = quantize(GainShape(8, (1, 4)), w, generator=generator())
    blocks, shapes = Grid.of((16, 16), (1, 4)).split(w), q.side["centroids"].decode()
    cosine = (blocks @ shapes.T).max(1).values.clamp_min(0)
    expected = (blocks.square().sum(1) - cosine.square()).sum()
    assert (q.decode() - w).square().sum().item() == pytest.approx(expected.item(), rel=1e-4)


def test_lengths_do_not_move_shapes() -> None:
    """Blocks on two rays, of lengths over six decades: a codebook of two cannot do that."""
    rays = torch.tensor([[3.0, 4.0], [-5.0, 12.0]]) / torch.tensor([[5.0], [13.0]])
    lengths = 10.0 ** torch.linspace(-3, 3, 32)
    w = rays[torch.arange(32) % 2] * lengths[:, None]
    decoded = quantize(GainShape(2, (1, 2)), w, generator=generator(), options=FitOptions(restarts=3)).decode()
    assert torch.allclose(decoded, w, rtol=1e-5)
    other = quantize(Codebook(2, (1, 2)), w, generator=generator()).decode()
    assert (decoded - w).square().sum() < 1e-6 * (other - w).square().sum()


def test_importance_counts() -> None:
    w, options = weights(32, 32), FitOptions(restarts=2)
    importance = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) ** 4
    with_it, without = (
        quantize(GainShape(8, (1, 4)), w, generator=generator(), importance=i, options=options).decode()
        for i in (importance, None)
    )
    assert ((with_it - w).square() * importance).sum() < ((without - w).square() * importance).sum()


def test_blocks_of_zeros() -> None:
    w = torch.zeros(4, 8)
    w[0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.allclose(quantize(GainShape(4, (1, 4)), w, generator=generator()).decode(), w)


@pytest.mark.parametrize("size", [0, -1, 0.5, True])
def test_refusals(size: int) -> None:
    with pytest.raises(PlanError, match="whole number of shapes"):
        GainShape(size)
