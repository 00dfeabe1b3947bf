from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

from bitbook import ECSQ, Codebook, FitOptions, Float, Pruned, Quantized, Uniform
from bitbook.errors import PlanError
from bitbook.quantizer import StreamSpec, quantize
from bitbook.rate.memoryless import frequencies, quantize_memoryless
from bitbook.theory.sources import Laplace


@pytest.fixture(scope="module")
def w() -> torch.Tensor:
    return Laplace().sample(6_000, Generator().manual_seed(0)).reshape(100, 60)


def cost(found: Quantized, w: torch.Tensor, lam: float) -> float:
    (spec,) = found.recipe.layout(found.shape)
    return float((found.decode() - w).square().sum()) + lam * frequencies(spec, found.codes[spec.name]).bits


def test_frequencies_cost_their_logarithm() -> None:
    codes = torch.tensor([[0, 0, 0, 0], [1, -1, 0, 2]])
    found = frequencies(StreamSpec("codes", (2, 4), None), codes)
    assert found.symbols is None
    bits = found(torch.tensor([[0, 1, -1, 2, -2, 90]]))[0]
    total = 8 + 5 / 2  # half an occurrence more for each of −2 … 2
    assert bits.tolist() == pytest.approx([-math.log2(n / total) for n in (5.5, 1.5, 1.5, 1.0, 1.0, 1.0)])
    labels = frequencies(StreamSpec("codes", (1, 4), 3), torch.tensor([[0, 0, 2, 0]], dtype=torch.uint8))
    assert labels.symbols is not None
    assert labels.symbols.tolist() == pytest.approx([-math.log2(n / 5.5) for n in (3.5, 0.5, 1.5)])


@pytest.mark.parametrize(
    "recipe", [ECSQ(1), ECSQ(4, points=Float()), ECSQ(2, (1, -1)), Codebook(64, (1, 2)), Codebook(16, (1, 3), pad=True)]
)
def test_the_sum_falls_and_the_rate_with_the_price(recipe: ECSQ | Codebook, w: torch.Tensor) -> None:
    options = FitOptions(step=0.7, iterations=0 if isinstance(recipe, ECSQ) else 20)
    rates = []
    for lam in (0.01, 0.1, 0.4):
        start = quantize(recipe, w, options=options, generator=Generator().manual_seed(0))
        found = quantize_memoryless(recipe, w, lam, options=options, generator=Generator().manual_seed(0))
        assert cost(found, w, lam) < cost(start, w, lam)
        (spec,) = found.recipe.layout(found.shape)
        rates.append(frequencies(spec, found.codes["codes"]).bits)
    assert rates == sorted(rates, reverse=True)


def test_points_are_the_means_of_what_they_stand_for(w: torch.Tensor) -> None:
    found = quantize_memoryless(ECSQ(3, points=Float()), w, 0.05, options=FitOptions(step=0.7, iterations=0), rounds=60)
    sizes, points = found.codes["codes"].abs(), found.side["points"].decode()[0]
    for size in (1, 2):
        assert float(points[size - 1]) == pytest.approx(float(w.abs()[sizes == size].mean()), rel=5e-3)
    book = quantize_memoryless(Codebook(8, (1, 1)), w, 0.05, rounds=60)
    labels = book.codes["codes"]
    for label, value in enumerate(book.side["centroids"].decode()[:, 0].tolist()):
        assert value == pytest.approx(float(w[labels == label].mean()), abs=5e-3)


def test_a_high_price_leaves_one_codeword(w: torch.Tensor) -> None:
    found = quantize_memoryless(Codebook(16, (1, 2)), w, 100.0, generator=Generator().manual_seed(0))
    assert found.side["centroids"].shape == (1, 2)
    assert int(quantize_memoryless(ECSQ(), w, 100.0).codes["codes"].abs().max()) == 0


def test_recipes_without_a_choice_are_refused(w: torch.Tensor) -> None:
    with pytest.raises(PlanError, match="no codes to choose among"):
        quantize_memoryless(Pruned(0.5, Uniform(4)), w, 0.1)
