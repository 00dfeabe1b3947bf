"""Rows scaled by what their errors weigh."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook import ECSQ, ErrorFeedback, FitOptions, RowScaled, Trellis, quantize, quantize_priced
from bitbook.errors import PlanError


def _weights(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def test_a_row_that_weighs_four_times_as_much_has_half_the_error() -> None:
    w = _weights(8, 4000)
    importance = torch.ones(8, 1).repeat(1, 4000)
    importance[::2] *= 16
    stored = quantize(RowScaled(ECSQ()), w, importance=importance, options=FitOptions(step=0.2))
    errors = (stored.decode() - w).square().mean(1)
    assert float(errors[1::2].mean() / errors[::2].mean()) == pytest.approx(16, rel=0.1)
    assert stored.side["rows"].codes["codes"].flatten().diff().abs().eq(4).all()  # two octaves in halves


def test_without_importance_it_is_the_inner_recipe() -> None:
    w = _weights(6, 10)
    scaled, plain = (quantize(recipe, w, options=FitOptions(step=0.1)) for recipe in (RowScaled(ECSQ()), ECSQ()))
    assert torch.equal(scaled.decode(), plain.decode())


@given(st.lists(st.floats(0, 1e6), min_size=4, max_size=4))
def test_any_importance_gives_finite_scales(weights: list[float]) -> None:
    importance = torch.tensor(weights)[:, None].repeat(1, 6)
    stored = quantize(RowScaled(ECSQ()), _weights(4, 6), importance=importance)
    rows = stored.side["rows"].decode()
    assert bool(rows.isfinite().all()) and float(rows.abs().max()) <= 8
    assert bool(stored.decode().isfinite().all())


@pytest.mark.parametrize("recipe", [ECSQ(), Trellis(8)])
def test_under_feedback_rows_of_little_weight_get_fewer_bits(recipe: ECSQ | Trellis) -> None:
    w = _weights(32, 48)
    x = _weights(500, 48) @ _weights(48, 48)
    rows = torch.logspace(0, -3, 32)
    encoder = ErrorFeedback(x.T.double() @ x.double() / 500, rows=rows)
    lam = 0.1
    plain = quantize_priced(recipe, w, lam, encoder=encoder)
    before = encoder.error(w, plain)
    scaled = quantize_priced(RowScaled(recipe), w, lam, encoder=encoder)
    after = encoder.error(w, scaled)
    entropies = [_entropy(q.codes["codes"]) for q in (plain, scaled)]
    assert after + lam * entropies[1] < before + lam * entropies[0]
    per_row = (scaled.decode() - w).square().mean(1)
    assert per_row[-8:].mean() > 5 * per_row[:8].mean()


def test_weights_of_rows_count_in_the_error() -> None:
    w, moments = _weights(4, 6), torch.eye(6)
    stored = quantize(ECSQ(), w)
    rows = torch.tensor([1.0, 2.0, 0.0, 5.0])
    expected = float((rows[:, None] * (stored.decode() - w).square()).sum())
    assert ErrorFeedback(moments, rows=rows).error(w, stored) == pytest.approx(expected, rel=1e-5)
    mapped = ErrorFeedback(moments, rows=rows).mapped(torch.eye(6).double(), torch.full((4,), 2.0).double())
    assert mapped.error(w, stored) == pytest.approx(4 * expected, rel=1e-5)


def test_weights_that_do_not_fit_are_refused() -> None:
    for rows, message in (
        (torch.ones(4, 1), "one for each row"),
        (torch.tensor([1.0, -1.0]), "not negative"),
        (torch.tensor([float("nan")]), "finite"),
    ):
        with pytest.raises(PlanError, match=message):
            ErrorFeedback(torch.eye(3), rows=rows)
    with pytest.raises(PlanError, match="3 weights of rows do not fit a weight of 4 rows"):
        quantize(ECSQ(), _weights(4, 3), encoder=ErrorFeedback(torch.eye(3), rows=torch.ones(3)))


def _entropy(codes: torch.Tensor) -> float:
    counts = codes.flatten().unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())
