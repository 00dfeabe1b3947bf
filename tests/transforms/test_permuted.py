from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbook import Codebook, FitOptions, Float, Permuted, Uniform, quantize
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.transforms.permuted import alike, order_of, rank_of, sorted_by_energy


def test_every_permutation_has_its_number() -> None:
    orders = [list(order) for order in itertools.permutations(range(5))]
    assert [rank_of(order) for order in orders] == list(range(120))  # lexicographic
    assert [order_of(rank, 5) for rank in range(120)] == orders
    with pytest.raises(CorruptArtifact, match="5 columns"):
        order_of(120, 5)


@given(st.integers(1, 300), st.integers(0, 1000))
def test_ranks_round_trip(n: int, seed: int) -> None:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    rank = rank_of(order)
    assert 0 <= rank < math.factorial(n) and order_of(rank, n) == order


def grouped(seed: int = 0) -> torch.Tensor:
    """Columns in pairs that are alike, pairs torn apart."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(64, 16, generator=generator).repeat_interleave(2, 1)
    w = pairs + 0.1 * torch.randn(64, 32, generator=generator)
    return w[:, torch.randperm(32, generator=generator)]


def log_determinant(w: torch.Tensor, d: int) -> float:
    vectors = w.double().reshape(-1, d)
    return float(torch.logdet(vectors.T @ vectors / len(vectors)))


def test_columns_that_are_alike_become_neighbours() -> None:
    w = grouped()
    order = alike(w.double().T @ w.double(), 2)
    assert sorted(order.tolist()) == list(range(32))
    assert log_determinant(w[:, order], 2) < log_determinant(w, 2) - 2
    correlation = torch.corrcoef(w[:, order].T)
    assert (correlation[::2, 1::2].diagonal() > 0.9).all()


def test_a_last_vector_may_be_short() -> None:
    w = grouped()[:, :31]
    order = alike(w.double().T @ w.double(), 4)
    assert sorted(order.tolist()) == list(range(31))
    quantize(Permuted(Codebook(8, pad=True)), w, generator=torch.Generator().manual_seed(0))


def test_codebooks_err_less() -> None:
    w = grouped()
    plain, permuted = (
        (quantize(r, w, generator=torch.Generator().manual_seed(0)).decode() - w).square().mean()
        for r in (Codebook(16, (1, 2)), Permuted(Codebook(16, (1, 2))))
    )
    assert permuted < plain / 2


def test_columns_that_share_a_scale_are_alike_in_size() -> None:
    w = torch.randn(16, 64) * torch.logspace(-2, 2, 64)[torch.randperm(64)]
    recipe = Uniform(4, (1, 8))
    plain, permuted = (((quantize(r, w).decode() - w) / w).abs().median() for r in (recipe, Permuted(recipe)))
    assert permuted < plain / 2
    assert torch.equal(sorted_by_energy(w), w.square().sum(0).argsort(descending=True))


def test_where_order_does_not_help_it_stays() -> None:
    w = torch.randn(8, 16)
    q = quantize(Permuted(Float()), w)
    assert torch.equal(q.decode(), w) and not q.side["rank"].decode().any()


def test_a_permutation_takes_the_fewest_bytes() -> None:
    q = quantize(Permuted(Uniform(4)), torch.randn(4, 144))
    assert q.side["rank"].shape == (1, math.ceil(math.log2(math.factorial(144)) / 8)) == (1, 104)
    assert "rank" not in quantize(Permuted(Uniform(4)), torch.randn(4, 1)).side


def test_importance_is_permuted() -> None:
    w, importance = grouped(), torch.rand(64, 32)
    options = FitOptions(iterations=5)
    recipe = Permuted(Codebook(4, (1, 2)))
    q = quantize(recipe, w, importance=importance, options=options, generator=torch.Generator().manual_seed(0))
    digits = bytes(q.side["rank"].decode().int().flatten().tolist())
    order = order_of(int.from_bytes(digits, "little"), 32)
    assert order != list(range(32))
    inner = quantize(
        Codebook(4, (1, 2)),
        w[:, order],
        importance=importance[:, order],
        options=options,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(q.codes["codes"], inner.codes["codes"])


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(PlanError, match="16385 columns cannot be permuted"):
        quantize(Permuted(Uniform(4)), torch.randn(1, 16385))
