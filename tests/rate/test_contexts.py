"""The causal model of zero flags: what it says one more non-zero costs, against the lengths with it and without."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import softplus

from bitbook.rate import contexts
from bitbook.rate.contexts import image_stride, price_flags


def blobs(rows: int, side: int, seed: int = 0) -> Tensor:
    """Flags that lie together: smooth noise, cut at a height, more of it in some rows than in others."""
    generator = Generator().manual_seed(seed)
    noise = torch.randn(rows, 1, side, side, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1).reshape(rows, -1)
    height = 0.3 + 0.3 * torch.rand(rows, 1, generator=generator)
    return smooth > height


def scattered(x: Tensor, seed: int = 0) -> Tensor:
    """As many flags in every row, in columns of no order."""
    order = torch.rand(x.shape, generator=Generator().manual_seed(seed)).argsort(1)
    return x.gather(1, order)


def test_flags_that_lie_together_cost_less() -> None:
    x = blobs(40, 20)
    assert price_flags(x).bits < 0.85 * price_flags(scattered(x)).bits
    empty = ~torch.nn.functional.max_pool2d(x.float().view(40, 1, 20, 20), 5, 1, 2).bool().view(40, 400)
    alone, beside = price_flags(x).cost[empty].mean(), price_flags(x).cost[~empty & ~x].mean()
    assert alone > beside + 1


@pytest.mark.parametrize("side", [9, 20, 28])
def test_the_length_of_an_image_row_is_found(side: int) -> None:
    assert image_stride(blobs(40, side).float()) == side
    assert image_stride(scattered(blobs(40, side)).float()) == 0


def test_neighbours_left_and_right_alone_are_found() -> None:
    noise = torch.randn(40, 1, 300, generator=Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool1d(noise, 3, stride=1, padding=1)[:, 0]
    assert image_stride((smooth > 0.5).float()) == 1


def test_the_cost_is_the_change_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the coefficients held, and the densities of lines, which hardly change, as they are."""
    x = blobs(30, 12)
    stride = image_stride(x.float())
    mean = (x.sum() + 0.5) / (x.numel() + 1)
    known = contexts._densities(x.float(), mean, stride)
    theta = torch.tensor([-2.0, 0.8, 0.7, 0.2, 0.1, 0.9, 0.5, 0.3])
    monkeypatch.setattr(contexts, "_fit", lambda features, flags, prior: theta)

    def length(flags: Tensor) -> float:
        rings = [contexts._sum_at(flags.float(), ring, stride) for ring in contexts._RINGS]
        features = torch.stack([f.expand_as(flags).reshape(-1).double() for f in (*known, *rings)], 1)
        odds = (features @ theta.double()).view_as(flags)
        return float((softplus(odds) - flags * odds).sum()) / math.log(2)

    cost = price_flags(x).cost
    for i, j in ((0, 0), (3, 50), (7, 77), (12, 143), (20, 66), (29, 13)):
        flipped = x.clone()
        flipped[i, j] = ~x[i, j]
        sign = -1 if x[i, j] else 1
        exact = min(max(sign * (length(flipped) - length(x)), -2.0), 18.0)
        assert cost[i, j].item() == pytest.approx(exact, abs=0.02)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_every_grid_has_a_price(rows: int, cols: int, share: float, seed: int) -> None:
    x = torch.rand(rows, cols, generator=Generator().manual_seed(seed)) < share
    flags = price_flags(x)
    assert bool(flags.cost.isfinite().all()) and flags.cost.shape == x.shape and 0 <= flags.bits < math.inf


def test_on_average_the_cost_is_that_of_independent_flags_where_they_are() -> None:
    x = torch.rand(200, 300, generator=Generator().manual_seed(0)) < 0.05
    cost = price_flags(x).cost
    assert cost.mean().item() == pytest.approx(math.log2(0.95 / 0.05), abs=0.2)
