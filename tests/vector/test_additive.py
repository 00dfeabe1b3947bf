from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitbook.vector import additive
from bitbook.vector.additive import beam_search, least_squares


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(blocks: Tensor, codes: Tensor, books: list[Tensor], weights: Tensor | None = None) -> Tensor:
    total = sum(book[codes[:, m]].double() for m, book in enumerate(books))
    square = (blocks.double() - total).square()
    return (square if weights is None else square * weights).sum(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_beam_of_everything_is_exhaustive_search(weighted: bool) -> None:
    blocks, books = gauss(40, 3), [gauss(k, 3, seed=k) for k in (3, 4, 5)]
    weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(9)) + 0.1 if weighted else None
    found = error(blocks, beam_search(blocks, books, 12, weights), books, weights)
    tried = [torch.tensor(code).expand(40, 3) for code in itertools.product(range(3), range(4), range(5))]
    best = torch.stack([error(blocks, codes, books, weights) for codes in tried]).min(0).values
    assert torch.allclose(found, best, rtol=1e-5)


def test_a_beam_of_one_is_greedy() -> None:
    blocks, books = gauss(50, 4), [gauss(6, 4, seed=k) for k in (1, 2)]
    left = blocks
    for m, book in enumerate(books):
        nearest = torch.cdist(left.double(), book.double()).argmin(1)
        assert torch.equal(beam_search(blocks, books[: m + 1], 1)[:, m], nearest)
        left = left - book[nearest]


def test_a_wider_beam_does_not_cost() -> None:
    blocks, books = gauss(500, 4), [gauss(8, 4, seed=k) / k for k in (1, 2, 3)]
    errors = [error(blocks, beam_search(blocks, books, beam), books).sum().item() for beam in (1, 2, 4, 8, 64)]
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(errors)) and errors[-1] < 0.95 * errors[0]


def test_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, books = gauss(300, 4), [gauss(8, 4, seed=k) for k in (1, 2)]
    expected = beam_search(blocks, books, 4)
    monkeypatch.setattr(additive, "_CHUNK_BYTES", 4000)
    assert torch.equal(beam_search(blocks, books, 4), expected)
    assert beam_search(blocks[:0], books, 4).shape == (0, 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_least_squares_is_that_of_lapack(weighted: bool) -> None:
    blocks, books = gauss(60, 3), [gauss(4, 3, seed=1), gauss(5, 3, seed=2)]
    codes = torch.stack([torch.arange(60) % 4, torch.arange(60) * 7 % 5], 1)
    weights = torch.rand(60, 3, generator=torch.Generator().manual_seed(9)) + 0.1 if weighted else None
    found = error(blocks, codes, least_squares(blocks, codes, books, weights), weights)
    chosen = torch.zeros(60, 9, dtype=torch.float64)
    chosen[torch.arange(60), codes[:, 0]] = 1
    chosen[torch.arange(60), 4 + codes[:, 1]] = 1
    total = 0.0
    for j in range(3):
        root = (torch.ones(60) if weights is None else weights[:, j]).double().sqrt()[:, None]
        answer = torch.linalg.lstsq(root * chosen, root * blocks[:, j : j + 1].double(), driver="gelsd").solution
        total += float((root * (blocks[:, j : j + 1] - chosen @ answer)).square().sum())
    assert float(found.sum()) == pytest.approx(total, rel=1e-6)


def test_unused_codewords_stay() -> None:
    books = [gauss(3, 2, seed=1), gauss(3, 2, seed=2)]
    moved = least_squares(gauss(20, 2), torch.zeros(20, 2, dtype=torch.long), books)
    assert torch.equal(moved[0][1:], books[0][1:]) and torch.equal(moved[1][1:], books[1][1:])
