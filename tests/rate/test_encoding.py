"""Rate-aware encoding: more price, fewer bytes; and never worse, by its own measure, than paying no attention."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from bitbook import ECSQ, Artifact, Binary, Codebook, FitOptions, Quantizer, Uniform, quantize
from bitbook.artifact import to_bytes
from bitbook.errors import PlanError
from bitbook.rate.encoding import quantize_priced
from bitbook.rate.rates import fit_rates


def laplace(rows: int, cols: int) -> Tensor:
    uniform = torch.rand(rows, cols, generator=Generator().manual_seed(0)) * 0.9998 - 0.4999
    return -torch.sign(uniform) * torch.log1p(-2 * uniform.abs())


RECIPES = [ECSQ(), ECSQ(3), ECSQ(1, (1, -1)), Uniform(5), Uniform(5, symmetric=False), Codebook(64, (1, 2))]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_price_trades_error_for_bytes(recipe: Quantizer) -> None:
    w = laplace(96, 128)
    points = []
    for lam in (0.0, 0.1, 1.0):
        q = quantize_priced(recipe, w, lam, generator=Generator().manual_seed(0), options=FitOptions(iterations=10))
        points.append((len(to_bytes(Artifact({"w": q}))[0]), float((q.decode() - w).square().mean())))
    sizes, errors = zip(*points, strict=True)
    assert list(sizes) == sorted(sizes, reverse=True) and sizes[2] < 0.8 * sizes[0]
    assert list(errors) == sorted(errors)


def test_entropy_constrained_beats_plain_rounding_at_equal_bits() -> None:
    """On Laplace samples at about one bit, a dead zone saves a part of a bit (Sullivan 1996)."""
    w = laplace(300, 300)

    def bits(step: float, lam: float) -> tuple[float, float]:
        q = quantize_priced(ECSQ(3), w, lam, options=FitOptions(step=step, iterations=0))
        (spec,) = q.recipe.layout(q.shape)
        codes = q.codes["codes"]
        return fit_rates(spec, codes).bits / w.numel(), float((q.decode() - w).square().mean())

    plain = bits(2.2, 0.0)
    priced = min((bits(step, 0.12) for step in (1.4, 1.6, 1.8)), key=lambda found: found[1] + 0.3 * found[0])
    assert priced[0] + 0.5 * torch.log2(torch.tensor(priced[1] / plain[1])).item() < plain[0] - 0.05


def test_without_a_choice_a_price_is_refused() -> None:
    with pytest.raises(PlanError, match="no codes to choose among"):
        quantize_priced(Binary(), laplace(4, 4), 0.1)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_price_of_zero_changes_nothing(recipe: Quantizer) -> None:
    w = laplace(16, 32)
    plain = quantize(recipe, w, generator=Generator().manual_seed(0))
    priced = quantize_priced(recipe, w, 0.0, generator=Generator().manual_seed(0))
    torch.testing.assert_close(priced.decode(), plain.decode())
