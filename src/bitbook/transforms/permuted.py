"""Permuted inputs, so that neighbours suit the recipe (Martinez et al. 2021, "Permute, Quantize, and Fine-tune")."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from bitbook.blocks import Shape, matrix_shape
from bitbook.errors import CorruptArtifact, PlanError
from bitbook.quantizer import Child, FitOptions, quantize
from bitbook.scalar.leaves import Integer
from bitbook.transforms.transform import Transform

_MOST_COLUMNS = 1 << 14  # beyond which numbers of permutations, and products of all pairs, take too long
_MOST_TRIED = 2048  # columns for which all swaps are tried, so that a fit stays within seconds
_LEAST_GAIN = 1e-6  # of the log determinant, for a swap to count
_RIDGE = 1e-6  # share of the mean variance on the diagonal: a column of zeros has no logarithm


@dataclass(frozen=True, repr=False)
class Permuted(Transform):
    """The inner recipe works on the columns in another order; the decoder undoes it.

    For recipes with one code for each vector of d columns, the order makes the determinant of the vectors' d × d second
    moments small, which bounds the error of a codebook (their section 3.2): columns dealt to the d places by falling
    energy, or left as they are, then swaps while they help.  For all others, columns are sorted by energy, so that
    those which share a scale are alike.  Where the inner recipe errs less on the columns as they are, they stay.

    The order of n columns is stored as its number among all n! (Lehmer 1960), in the fewest whole bytes.
    """

    own: ClassVar[tuple[str, ...]] = ("rank",)

    def own_children(self, shape: Shape) -> Mapping[str, Child]:
        cols = matrix_shape(shape)[1]
        if cols > _MOST_COLUMNS:
            raise PlanError(f"{self!r}: {cols} columns cannot be permuted; use it for at most {_MOST_COLUMNS}")
        size = _rank_bytes(cols)
        return {"rank": Child(Integer(256), (1, size))} if size else {}  # one column has one order

    def find(
        self, w: Tensor, importance: Tensor | None, options: FitOptions, generator: Generator | None
    ) -> dict[str, Tensor]:
        shape = tuple(w.shape)
        rows, cols = matrix_shape(shape)
        places = self.inner.columns(shape)
        matrix = w.detach().reshape(rows, cols).double()
        found = sorted_by_energy(matrix) if places == 1 else alike(matrix.T @ matrix, places)
        orders = [_rank_tensor(w, order) for order in (range(cols), found.tolist())] if cols > 1 else []

        def error(rank: Tensor) -> float:
            x, weights = self.forward(w, {"rank": rank}), self.importance_of(w, importance, {"rank": rank})
            fixed = Generator().manual_seed(0)
            q = quantize(self.inner, x, importance=weights, options=options, generator=fixed)
            squares = (q.decode() - x).double().square()
            return float(squares.sum() if weights is None else (weights * squares).sum())

        return {"rank": min(orders, key=error)} if orders else {}

    def forward(self, w: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        rows, cols = matrix_shape(tuple(w.shape))
        return w.reshape(rows, cols)[:, _order(own, cols).to(w.device)].reshape(w.shape)

    def back(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        rows, cols = matrix_shape(tuple(x.shape))
        return x.reshape(rows, cols)[:, _order(own, cols).argsort().to(x.device)].reshape(x.shape)

    def importance_of(self, w: Tensor, importance: Tensor | None, own: Mapping[str, Tensor]) -> Tensor | None:
        return None if importance is None else self.forward(importance, own)


def sorted_by_energy(w: Float[Tensor, "rows n"]) -> Int[Tensor, " n"]:
    """The columns by falling sum of squares, equals as they come."""
    return w.square().sum(0).sort(descending=True, stable=True).indices


def alike(gram: Float[Tensor, "n n"], d: int) -> Int[Tensor, " n"]:
    """An order whose vectors of `d` neighbouring columns have second moments of a small determinant.

    Args:
        gram: inner products of all pairs of columns.
        d: columns per vector; a last vector with fewer is filled with zeros.
    """
    n = len(gram)
    count = -(-n // d)
    if not gram.any():
        return torch.arange(n)
    scale = math.frexp(float(gram.diagonal().mean()))[1]  # a power of two, so that twice the weights move alike
    moments = gram.new_zeros(count * d, count * d)
    moments[:n, :n] = torch.ldexp(gram, torch.tensor(-scale))
    ridge = _RIDGE * count * torch.eye(d, dtype=gram.dtype)
    columns = torch.arange(count * d).reshape(count, d)
    if n == count * d:
        dealt = moments.diagonal().sort(descending=True, stable=True).indices.reshape(d, count).T
        columns = min((columns, dealt), key=lambda c: float(torch.logdet(_parts(moments, c).sum(0) + ridge)))
    columns = _swap(moments, columns, n, ridge)
    if n == count * d:  # the order of vectors is free: neighbours stay neighbours, for coders that look at them
        columns = columns[columns[:, 0].argsort()]
    return columns.reshape(-1)[:n]


def _swap(moments: Tensor, columns: Int[Tensor, "count d"], n: int, ridge: Float[Tensor, "d d"]) -> Tensor:
    """Swap each place with the one that lowers the determinant most, in sweeps, until none does."""
    d = columns.shape[1]
    flat = columns.flatten().clone()
    columns = flat.view(-1, d)
    parts = _parts(moments, columns)
    total = parts.sum(0)
    least = float(torch.logdet(total + ridge))
    places = torch.arange(n)
    tried, unchanged, at = 0, 0, 0
    order = torch.randperm(n, generator=Generator().manual_seed(0)).tolist()
    while unchanged < n and tried < _MOST_TRIED:
        here, at = order[at], (at + 1) % n
        tried, unchanged = tried + 1, unchanged + 1
        mine, theirs = here // d, places // d
        first = columns[mine].repeat(n, 1)  # this vector after each swap
        first[:, here % d] = flat[:n]
        second = columns[theirs]  # and the other one
        second[places, places % d] = flat[here]
        same = theirs == mine
        first[places[same], places[same] % d] = flat[here]
        change = _parts(moments, first) - parts[mine]
        change += torch.where(same[:, None, None], 0, _parts(moments, second) - parts[theirs])
        values = torch.logdet(total + change + ridge).nan_to_num(math.inf)
        best = int(values.argmin())
        if not values[best] < least - _LEAST_GAIN:
            continue
        flat[[here, best]] = flat[[best, here]]
        parts = _parts(moments, columns)
        total, unchanged = parts.sum(0), 0
        least = float(torch.logdet(total + ridge))
    return columns


def _parts(moments: Tensor, columns: Int[Tensor, "count d"]) -> Float[Tensor, "count d d"]:
    """What each vector adds to the second moments."""
    return moments[columns[:, :, None], columns[:, None, :]]


# -- permutations as numbers --------------------------------------------------------------------
def rank_of(order: Sequence[int]) -> int:
    """The number of a permutation of 0 … n - 1: Σ l_i · (n - 1 - i)!, with l_i the smaller ones that come later."""
    left = sorted(order)
    rank = 0
    for value in order:
        place = left.index(value)
        rank = rank * len(left) + place
        left.pop(place)
    return rank


def order_of(rank: int, n: int) -> list[int]:
    """The permutation of a number; raises `CorruptArtifact` for a number of n! or more."""
    places = []
    for size in range(1, n + 1):
        rank, place = divmod(rank, size)
        places.append(place)
    if rank:
        raise CorruptArtifact(f"the order of {n} columns has a number of {n}! or more")
    left = list(range(n))
    return [left.pop(place) for place in reversed(places)]


@functools.lru_cache(maxsize=256)
def _rank_bytes(n: int) -> int:
    """Bytes of the largest number of a permutation."""
    return ((math.factorial(n) - 1).bit_length() + 7) // 8


def _rank_tensor(like: Tensor, order: Sequence[int]) -> Float[Tensor, "1 bytes"]:
    digits = rank_of(order).to_bytes(_rank_bytes(len(order)), "little")
    return like.new_tensor(list(digits)).reshape(1, -1)


def _order(own: Mapping[str, Tensor], n: int) -> Int[Tensor, " n"]:
    digits = own["rank"].reshape(-1).tolist() if own else []
    return _decoded(bytes(map(int, digits)), n)


@functools.lru_cache(maxsize=256)  # asked for in every training step
def _decoded(digits: bytes, n: int) -> Int[Tensor, " n"]:
    return torch.tensor(order_of(int.from_bytes(digits, "little"), n))
