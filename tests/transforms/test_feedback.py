"""Error feedback through recipes that encode another tensor than the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from bitbook import (
    ECSQ,
    Balanced,
    Codebook,
    ErrorFeedback,
    FitOptions,
    Lattice,
    Permuted,
    Quantizer,
    Residual,
    Rotated,
    SignMagnitude,
    Uniform,
    quantize,
)

FUSED = Codebook(16, (1, 4), centroids=Uniform(5))
RECIPES = [
    Rotated(Uniform(3, (1, -1))),
    Rotated(ECSQ(), seed=3),
    Balanced(Uniform(3, (1, -1))),
    Permuted(Codebook(16, (1, 4))),
    Permuted(Rotated(Balanced(Uniform(4)))),
    Lattice("E8"),
    Residual((FUSED, FUSED)),
    Residual((FUSED, Uniform(2, (1, 8)))),
    SignMagnitude(FUSED),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_feedback_reaches_what_is_inside(recipe: Quantizer) -> None:
    generator = Generator().manual_seed(0)
    x = torch.randn(400, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    w = torch.randn(32, 48, generator=generator)
    encoder = ErrorFeedback((x.T @ x / len(x)).double())
    options = FitOptions(iterations=10)
    plain = quantize(recipe, w, options=options, generator=Generator().manual_seed(1))
    fed = quantize(recipe, w, encoder=encoder, options=options, generator=Generator().manual_seed(1))
    assert encoder.report is not None and encoder.report.used
    assert encoder.error(w, fed) < 0.9 * encoder.error(w, plain)
