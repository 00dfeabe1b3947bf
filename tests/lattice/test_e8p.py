"""E8P against a search through all 65,536 codewords."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitbook import E8P, FitOptions, quantize
from bitbook.errors import PlanError
from bitbook.lattice import e8p, kernels


def all_codewords() -> Tensor:
    codes = torch.arange(256)
    return e8p.codewords(codes.repeat_interleave(256), codes.repeat(256))


def test_the_codebook_is_what_the_paper_says() -> None:
    norms, counts = e8p.patterns().square().sum(1).unique(return_counts=True)
    assert norms.tolist() == [2, 4, 6, 8, 10, 12] and counts[:5].sum() == 227 and counts[5] == 29
    words = all_codewords()
    assert len(words.unique(dim=0)) == 1 << 16
    for shift, part in ((0.25, words.reshape(256, 2, 128, 8)[:, 0]), (-0.25, words.reshape(256, 2, 128, 8)[:, 1])):
        points = part - shift
        assert torch.equal(points.remainder(1), torch.full_like(points, 0.5))
        assert not points.sum(-1).remainder(2).any()


def test_no_codeword_is_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 2.0, 10.0]).repeat_interleave(20)[:, None]
    x = torch.randn(80, 8, generator=generator) * scale
    least = (x.double()[:, None] - all_codewords().double()).square().sum(2).min(1).values
    for search in (e8p.nearest, kernels.nearest):
        error = (x.double() - e8p.codewords(*search(x, e8p.patterns())).double()).square().sum(1)
        assert torch.allclose(error, least, rtol=1e-6)


@pytest.mark.parametrize("cols", [1, 5, 9, 15])
def test_padding_has_no_say(cols: int) -> None:
    w = 3 * torch.randn(200, cols, generator=torch.Generator().manual_seed(cols))
    recipe, side = E8P(pad=True), {"scale": torch.ones(1, 1)}
    decoded = recipe.decode(recipe.encode(w, side), side, (200, cols))
    start = cols - cols % 8
    distance = (w[:, None, start:].double() - all_codewords()[:, : cols % 8].double()).square().sum(2)
    found = (w - decoded)[:, start:].double().square().sum(1)
    assert torch.allclose(found, distance.min(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(recipe.decode(recipe.encode(decoded, side), side, (200, cols)), decoded)


def test_loops_and_torch_agree_also_on_ties() -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)) * 1.2
    x = torch.cat([x, (x * 2).round() / 2, torch.zeros(1, 8)])  # half integers are equally near to many codewords
    for a, b in zip(kernels.nearest(x, e8p.patterns()), e8p.nearest(x, e8p.patterns()), strict=True):
        assert torch.equal(a, b)


def test_gaussian_weights_at_two_bits() -> None:
    """Tseng et al. 2024, table 1 and figure 3: .0918 at most a percent worse."""
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(2))
    for options in (FitOptions(), FitOptions(range="mse")):
        error = (quantize(E8P(), w, options=options).decode() - w).square().mean()
        assert error < 1.01 * 0.0918


def test_the_mse_rule_serves_heavy_tails_better() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) ** 3
    plain, best = (quantize(E8P(), w, options=FitOptions(range=rule)).decode() for rule in (None, "mse"))
    assert (best - w).square().mean() < (plain - w).square().mean()


def test_refusals() -> None:
    with pytest.raises(PlanError, match="use mse, or None"):
        quantize(E8P(), torch.ones(2, 8), options=FitOptions(range="absmax"))
    with pytest.raises(PlanError, match="do not divide into blocks of 8"):
        quantize(E8P(), torch.ones(2, 9))
    with pytest.raises(PlanError, match="block"):
        E8P(block=(0, 8))
