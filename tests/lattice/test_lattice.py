"""Lattices against a search over all points nearby, and against what entropy-coded scalars cost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitbook import ECSQ, Codebook, FitOptions, Float, Lattice, Quantized, Quantizer, quantize
from bitbook.errors import PlanError
from bitbook.lattice.points import nearest, nearest_d, nearest_e8


def points_nearby(kind: str) -> Tensor:
    """All points of the lattice whose coordinates are at most 2 in size."""
    size = {"D4": 4, "E8": 8}[kind]
    whole = torch.tensor(list(itertools.product((-1, 0, 1, 2) if size == 8 else range(-2, 3), repeat=size))).double()
    whole = whole[whole.sum(1) % 2 == 0]
    return whole if kind == "D4" else torch.cat([whole, whole - 0.5])


@pytest.mark.parametrize("kind", ["D4", "E8"])
def test_no_point_is_nearer(kind: str) -> None:
    points = points_nearby(kind)
    x = torch.rand(50, points.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = nearest(kind, x)
    least = torch.cdist(x, points, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert torch.allclose((x - found).norm(dim=1), least)
    assert not found.sum(1).remainder(2).any()


@given(st.lists(st.integers(-9, 9), min_size=8, max_size=8), st.booleans())
def test_points_are_their_own_nearest(whole: list[int], half: bool) -> None:
    whole[7] += sum(whole) % 2
    x = torch.tensor([whole]).double()
    assert torch.equal(nearest_d(x), x)
    x += 0.5 * half
    assert torch.equal(nearest_e8(x), x)


def test_ties_follow_the_rule() -> None:
    x = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 1.5, 0.4, 0], [-0.3, 0, 0.3, 1]]).double()
    expected = [[2, 0, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0], [-1, 0, 0, 1]]
    assert nearest_d(x).tolist() == expected
    middle = torch.full((1, 8), 0.25).double()  # as near to zero as to one half everywhere
    assert not nearest_e8(middle).any()


def entropy(codes: Tensor) -> float:
    counts = codes.flatten().unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


def cost(recipe: Quantizer, w: Tensor, step: float) -> tuple[float, float]:
    """Bits per weight at the frequencies of each stream, and the mean squared error."""
    q = quantize(recipe, w, options=FitOptions(step=step))
    bits = sum(entropy(stream.codes) for stream in q.streams()) / w.numel()
    return bits, float((q.decode() - w).square().mean())


@pytest.mark.parametrize(("kind", "step", "gain"), [("D4", 2**-2.25, 0.33), ("E8", 2**-2.0, 0.58)])
def test_rounder_cells_are_worth_what_theory_says(kind: str, step: float, gain: float) -> None:
    """At 4 bits: nearly .37 dB for D4 and .65 dB for E8; 6.02 dB are a bit."""
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    bits, error = cost(Lattice(kind), w, step)  # type: ignore[arg-type]
    scalar_bits, scalar_error = cost(ECSQ(), w, 0.25)
    assert 10 * math.log10(scalar_error / error) - 6.02 * (bits - scalar_bits) > gain


def test_a_step_of_ones_own() -> None:
    w = torch.randn(4, 8)
    q = quantize(Lattice("D4", scale=Float()), w, options=FitOptions(step=0.25))
    assert torch.equal(q.decode() / 0.25, (q.decode() / 0.25).round())


def test_codes_are_sorted_by_what_the_decoder_knows() -> None:
    """By hand: one vector above another, the upper one plus one half."""
    w = torch.tensor([[0.5] * 8, [1, 2, 3, 4, 5, 6, 7, 2]])
    q = quantize(Lattice("E8", scale=Float()), w, options=FitOptions(step=1.0))
    assert q.codes["coset"].tolist() == [[1], [0]]
    assert q.codes["free"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [0] * 7]
    assert q.codes["last"].tolist() == [[1], [0]]
    assert torch.equal(q.decode(), w)


def test_codewords_stored_by_a_lattice_are_all_kept() -> None:
    """Rows of codes are not the codes of rows, so that none can be left out."""
    q = quantize(Codebook(8, centroids=Lattice("D4")), torch.randn(12, 16), generator=torch.Generator().manual_seed(0))
    unused = Quantized(q.recipe, q.shape, {"codes": q.codes["codes"].clamp_max(5)}, q.side)
    kept = q.recipe.without_unused(unused)
    assert kept.recipe == q.recipe and torch.equal(kept.decode(), unused.decode())


def test_outliers_stay_exact() -> None:
    w = torch.zeros(1, 8)
    w[0, 3] = 1e6
    q = quantize(Lattice(), w, options=FitOptions(step=1.0))
    assert torch.equal(q.decode(), w)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: Lattice("A2"), "'D4' or 'E8'"),  # type: ignore[arg-type]
        (lambda: Lattice("D4", (0, 1)), "block"),
        (lambda: quantize(Lattice("E8"), torch.ones(2, 12)), "12 columns do not divide into blocks of 8"),
        (lambda: quantize(Lattice("E8", (1, 4)), torch.ones(2, 16)), "cut vectors of 8; use a multiple of 8"),
    ],
)
def test_refusals(recipe, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=message):
        recipe()
