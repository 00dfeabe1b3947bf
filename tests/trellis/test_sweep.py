"""The compiled loop of error feedback along a path is the path column by column."""

import pytest
import torch
from torch import Tensor

from bitbook import ErrorFeedback, FeedbackOptions, FitOptions, Quantizer, RowScaled, Trellis, quantize, quantize_priced
from bitbook.trellis.sweep import LadderPath


def _problem(rows: int, cols: int, groups: int) -> tuple[Tensor, ErrorFeedback]:
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(rows, cols, generator=generator) * 0.1
    x = torch.randn(300, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    moments = (x.T @ x / 300).double() * torch.arange(1, groups + 1)[:, None, None]
    weights = torch.rand(rows, generator=generator)
    return w, ErrorFeedback(moments, FeedbackOptions(search=False), rows=weights)


@pytest.mark.parametrize(("rows", "cols", "groups"), [(1, 1, 1), (3, 70, 1), (16, 27, 2), (40, 5, 4)])
@pytest.mark.parametrize("recipe", [Trellis(8), Trellis(4, 2), Trellis(16, block=(1, -1)), RowScaled(Trellis(8, 1))])
def test_codes_are_those_of_the_generic_encoder(
    recipe: Quantizer, rows: int, cols: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, encoder = _problem(rows, cols, groups)

    def both() -> list[Tensor]:
        plain = quantize(recipe, w, encoder=encoder, options=FitOptions(step=0.04))
        priced = quantize_priced(recipe, w, 0.003 * encoder.average, encoder=encoder)
        return [found.decode() for found in (plain, priced)]

    assert LadderPath.serves(w)
    fast = both()
    monkeypatch.setattr(LadderPath, "serves", staticmethod(lambda w: False))
    for a, b in zip(fast, both(), strict=True):
        assert torch.equal(a, b)
