"""Codebooks against the source material: rows, their centroids' gradients, scalar-quantized centroids."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from bitbook import Codebook, FakeQuantize, FitOptions, Float, Quantizer, Uniform, quantize
from bitbook.blocks import Grid
from bitbook.errors import PlanError


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def clustered(recipe: Codebook, w: Tensor) -> FakeQuantize:
    return FakeQuantize(recipe, nn.Parameter(w.clone()), generator=generator())


def test_every_whole_percentage_gives_the_source_materials_k() -> None:
    """`k = max(int(rows · percent / 100), 1)`."""
    for rows, percent in itertools.product(range(1, 301), range(1, 101)):
        k = max(int(rows * percent / 100), 1)
        assert Codebook(percent / 100, (1, -1)).resolve((rows, 8)).size == k, (rows, percent)


def test_ten_percent_of_an_output_layer_is_one_row() -> None:
    """So that no training of the source material's printed example can leave chance: all classes agree."""
    w = weights(10, 64)
    q = quantize(Codebook(0.10, (1, -1)), w, generator=generator())
    assert q.recipe.size == 1
    assert torch.allclose(q.decode(), w.mean(0).expand(10, 64), atol=1e-6)
    logits = weights(5, 64, seed=1) @ q.decode().T
    assert torch.allclose(logits, logits[:, :1].expand(5, 10), atol=1e-6)


@pytest.mark.parametrize("block", [(1, -1), (-1, 1), (1, 4), (2, 4), (3, 2)])
def test_decoding_looks_codewords_up(block: tuple[int, int]) -> None:
    w = weights(6, 8)
    q = quantize(Codebook(3, block), w, generator=generator())
    grid = Grid.of((6, 8), block)
    codewords = q.side["centroids"].decode()
    labels = q.codes["codes"].flatten().tolist()
    assert q.codes["codes"].shape == (grid.R, grid.C)
    for decoded, original, label in zip(grid.split(q.decode()), grid.split(w), labels, strict=True):
        assert torch.equal(decoded, codewords[label])
        distances = [(original - codeword).double().square().sum().item() for codeword in codewords]
        assert label == distances.index(min(distances))


def test_codewords_are_the_means_of_their_blocks() -> None:
    w = weights(20, 8)
    q = quantize(Codebook(5, (1, -1)), w, generator=generator())
    labels = q.codes["codes"].flatten()
    for k, codeword in enumerate(q.side["centroids"].decode()):
        assert torch.allclose(codeword, w[labels == k].mean(0), atol=1e-6)


def test_the_fit_is_as_good_as_scikit_learns_on_rows() -> None:
    """The source material's call: 10 restarts, seed 0.  Equality is by inertia, not by labels."""
    cluster = pytest.importorskip("sklearn.cluster")
    w = weights(64, 16)
    ours = quantize(Codebook(0.25, (1, -1)), w, options=FitOptions(restarts=10), generator=generator()).decode()
    theirs = cluster.KMeans(16, n_init=10, random_state=0).fit(w.numpy()).inertia_
    assert (ours - w).double().square().sum().item() <= theirs * 1.02


def test_a_codewords_gradient_is_the_sum_over_its_rows() -> None:
    w = weights(12, 5)
    source = clustered(Codebook(4, (1, -1)), w)
    labels = source.codes["codes"].flatten().tolist()
    direction = weights(12, 5, seed=1)
    (source() * direction).sum().backward()
    expected = torch.zeros(4, 5)
    for row, label in enumerate(labels):
        expected[label] += direction[row]
    assert torch.allclose(source.side.centroids.latent.grad, expected, atol=1e-6)


def test_assignments_stay_fixed_while_centroids_train() -> None:
    source = clustered(Codebook(4, (1, -1)), weights(12, 5))
    codes = source.codes["codes"].clone()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        source().square().sum().backward()
        optimizer.step()
    assert torch.equal(source.codes["codes"], codes)
    rows = source().detach()
    assert all(torch.equal(rows[i], rows[j]) for i in range(12) for j in range(12) if codes[i] == codes[j])
    assert [name for name, _ in source.named_parameters()] == ["side.centroids.latent"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fused_centroids_are_scalar_quantized_in_every_forward(bits: int) -> None:
    """`s · clip(round(C / s), -q, q)` with the scale of all centroids; straight through to the float ones."""
    q = 2 ** (bits - 1) - 1
    source = clustered(Codebook(0.5, (1, -1), centroids=Uniform(bits)), weights(12, 5))
    labels = source.codes["codes"].flatten().long()
    for step in range(3):
        centroids = source.side.centroids.latent.detach().clone()
        scale = ((centroids.max() - centroids.min()) / (2 * q)).clamp_min(1e-8)
        rounded = (centroids / scale).round().clamp(-q, q) * scale
        value = source()
        assert torch.equal(value, rounded[labels])
        direction = weights(12, 5, seed=step)
        source.zero_grad()
        (value * direction).sum().backward()
        passed = (centroids.abs() <= q * scale).float()
        expected = torch.zeros_like(centroids).index_add(0, labels, direction) * passed
        assert torch.allclose(source.side.centroids.latent.grad, expected, atol=1e-6)
        with torch.no_grad():
            source.side.centroids.latent.add_(source.side.centroids.latent.grad, alpha=-0.05)
    assert source().unique().numel() <= 2 * q + 1


@pytest.mark.parametrize("centroids", [Uniform(3), Uniform(2, (1, -1)), Float("bfloat16")], ids=repr)
def test_blocks_are_assigned_to_codewords_as_stored(centroids: Quantizer) -> None:
    w = weights(32, 8)
    q = quantize(Codebook(8, (1, 4), centroids=centroids), w, generator=generator())
    blocks = Grid.of((32, 8), (1, 4)).split(w).double()
    nearest = torch.cdist(blocks, q.side["centroids"].decode().double()).argmin(1)
    assert torch.equal(q.codes["codes"].flatten().long(), nearest)


def test_rounding_inside_the_loop_is_not_worse_than_rounding_after_it() -> None:
    w = weights(64, 32)
    inside = quantize(Codebook(16, (1, 4), centroids=Uniform(3)), w, generator=generator()).decode()
    fit = quantize(Codebook(16, (1, 4)), w, generator=generator())
    rounded = quantize(Uniform(3), fit.side["centroids"].decode()).decode()
    after = fit.recipe.decode(fit.codes, {"centroids": rounded}, fit.shape)
    assert (inside - w).square().sum() <= (after - w).square().sum()


def test_no_codeword_is_stored_twice() -> None:
    for recipe in (Codebook(16, (1, 2), centroids=Uniform(2)), Codebook(16, (1, 1))):
        w = (weights(8, 8) * 4).round() / 4
        q = quantize(recipe, w, generator=generator())
        codewords = q.side["centroids"].decode()
        assert len(codewords.unique(dim=0)) == len(codewords) == q.recipe.size


def test_ties_go_to_the_first_codeword() -> None:
    recipe = Codebook(2, (1, 1))
    side = {"centroids": torch.tensor([[1.0], [-1.0]])}
    assert recipe.encode(torch.zeros(2, 3), side)["codes"].tolist() == [[0, 0, 0], [0, 0, 0]]
    side = {"centroids": torch.tensor([[-1.0], [1.0]])}
    assert recipe.encode(torch.zeros(2, 3), side)["codes"].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_padding_weighs_nothing() -> None:
    """Codewords in the last, narrower blocks match what is there; what padding would be is dropped."""
    w = torch.tensor([[1.0, 2.0, 3.0, 1.0], [1.0, 2.0, 3.0, 1.0], [7.0, 8.0, 9.0, 7.0]])
    q = quantize(Codebook(2, (1, 3), pad=True), w, generator=generator())
    assert torch.equal(q.decode(), w)


def test_importance_pulls_codewords() -> None:
    w = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    importance = torch.tensor([[1.0], [3.0], [1.0], [1.0]])
    q = quantize(Codebook(2, (1, 1)), w, importance=importance, generator=generator())
    assert sorted(q.side["centroids"].decode().flatten().tolist()) == [0.75, 10.5]


def test_more_codewords_than_blocks_are_as_many_as_blocks() -> None:
    assert Codebook(100, (1, 4)).resolve((3, 8)).size == 6
    w = weights(3, 8)
    assert torch.equal(quantize(Codebook(100, (1, 4)), w, generator=generator()).decode(), w)


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.01, float("nan"), True, "8"])
def test_refusals(size: int) -> None:
    with pytest.raises(PlanError, match="whole number of codewords"):
        Codebook(size)


def test_a_fraction_needs_a_shape() -> None:
    with pytest.raises(PlanError, match="resolve"):
        Codebook(0.5).layout((4, 4))
