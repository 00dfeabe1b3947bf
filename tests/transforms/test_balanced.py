from __future__ import annotations

import pytest
import torch

from bitbook import Balanced, Codebook, Float, Rotated, Uniform, quantize
from bitbook.errors import PlanError
from bitbook.quantizer import quantize_side
from bitbook.transforms.balanced import balance


def test_rows_and_columns_are_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 30, generator=generator) * torch.rand(20, 1, generator=generator) * 100
    w[:, 4] *= 50
    rows, cols = balance(w)
    x = w / (rows * cols)
    for axis in (0, 1):
        rms = x.square().mean(axis).sqrt()
        assert torch.allclose(rms, torch.ones_like(rms), atol=1e-3)


def test_zero_rows_and_columns_have_harmless_scales() -> None:
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    w[2], w[:, 5] = 0, 0
    rows, cols = balance(w)
    assert rows[2] == w.square().mean().sqrt() and cols[0, 5] == 1
    assert torch.equal(quantize(Balanced(Uniform(4)), w).decode()[2], torch.zeros(8))


def test_outlier_columns_do_not_set_the_range_of_all() -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w[:, 9] *= 40
    w[5] *= 40
    plain, balanced = (
        ((quantize(r, w).decode() - w).abs() / w.abs().amax(0)).square().mean()
        for r in (Uniform(4, (1, -1)), Balanced(Uniform(4, (1, -1))))
    )
    assert balanced < plain / 5


def test_the_inner_recipe_is_fitted_behind_the_stored_scales() -> None:
    """And its codewords err little where the product of scales, and the importance, are large."""
    w, importance = torch.randn(8, 16), torch.rand(8, 16)
    recipe = Balanced(Codebook(4), rows=Float("bfloat16"), cols=Uniform(8))
    q = quantize(recipe, w, importance=importance, generator=torch.Generator().manual_seed(0))
    scales = q.side["rows"].decode() * q.side["cols"].decode()
    weights = importance * scales.square()
    inner = quantize(Codebook(4), w / scales, importance=weights, generator=torch.Generator().manual_seed(0))
    assert torch.equal(q.codes["codes"], inner.codes["codes"])
    assert torch.equal(q.decode(), inner.decode() * scales)


def test_its_scales_are_positive_side_tensors() -> None:
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    q = quantize(Balanced(Codebook(4), rows=Uniform(8)), w, generator=torch.Generator().manual_seed(0))
    assert list(q.side) == ["rows", "cols", "centroids"]
    rows = balance(w)[0]
    assert torch.allclose(q.side["rows"].decode(), rows, atol=float(rows.max()) / 127)
    assert quantize_side(Uniform(8), rows, recipe_options(q)).recipe == q.side["rows"].recipe


def recipe_options(q):  # type: ignore[no-untyped-def]
    from bitbook import FitOptions

    return q.recipe.side_options("rows", FitOptions(range="minmax"))


def test_one_inside_the_other_is_refused() -> None:
    with pytest.raises(PlanError, match="side tensor 'rows'; nest it only once"):
        quantize(Balanced(Rotated(Balanced(Uniform(4)))), torch.randn(4, 8))
