"""What codes would cost, against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from bitbook.quantizer import StreamSpec
from bitbook.rate.rates import fit_place_rates


def sparse(rows: int, cols: int, share: float, seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    size = (torch.rand(rows, cols, generator=generator) < share) * torch.randint(
        1, 4, (rows, cols), generator=generator
    )
    return (size * (2 * torch.randint(2, (rows, cols), generator=generator) - 1)).int()


def entropy(codes: Tensor) -> float:
    _, counts = codes.unique(return_counts=True)
    p = counts.double() / codes.numel()
    return float(-(p * p.log2()).sum()) * codes.numel()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_without_structure_the_rate_is_the_entropy(share: float) -> None:
    codes = sparse(200, 300, share)
    bits = fit_place_rates(StreamSpec("codes", (200, 300), None), codes).bits
    assert bits == pytest.approx(entropy(codes), rel=0.05)


def test_empty_rows_and_columns_cost_little() -> None:
    codes = sparse(100, 100, 0.2)
    codes[50:] = 0
    codes[:, 50:] = 0
    rates = fit_place_rates(StreamSpec("codes", (100, 100), None), codes)
    inside = fit_place_rates(StreamSpec("codes", (50, 50), None), codes[:50, :50].contiguous()).bits
    assert 0 < rates.bits - inside < 0.1 * inside
    assert inside == pytest.approx(entropy(codes[:50, :50]), rel=0.15)
    assert rates(torch.ones_like(codes))[60:, 60:].min() > rates(torch.ones_like(codes))[:50, :50].max() + 2


def test_unordered_codes_cost_their_frequency() -> None:
    codes = torch.tensor([[0, 0, 0, 2], [0, 0, 1, 2]])
    rates = fit_place_rates(StreamSpec("codes", (2, 4), 4), codes)
    assert rates(codes)[0, 0].item() == pytest.approx(-math.log2(5.5 / 10), rel=1e-6)
    assert rates(codes)[0, 3].item() == pytest.approx(-math.log2(2.5 / 10), rel=1e-6)


def test_a_centre_makes_codes_ordered() -> None:
    codes = sparse(40, 60, 0.1).clamp(-3, 3)
    free = fit_place_rates(StreamSpec("codes", (40, 60), None), codes)
    centred = fit_place_rates(StreamSpec("codes", (40, 60), 7, 3), codes + 3)
    assert torch.equal(free(codes), centred(codes + 3))


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_a_larger_magnitude_never_costs_less(rows: int, cols: int, share: float, seed: int) -> None:
    codes = sparse(rows, cols, share, seed)
    rates = fit_place_rates(StreamSpec("codes", (rows, cols), None), codes)
    bits = torch.stack([rates(torch.full_like(codes, size)) for size in range(40)])
    assert not bits[0].any() and bool(bits.isfinite().all())
    assert bool((bits[1:].diff(dim=0) >= 0).all()) and rates.bits >= 0
