"""Where a tensor's vectors, and its entropy coder, gain over fixed-rate scalars: measured on its own weights.

    D(scalar) ──► D(vectors of the shuffled tensor) ──► D(vectors of the tensor)      space filling + shape | memory
         └──────► D(ECSQ) ──► D(R)                                                    entropy coding | what is left

All at the same bits per weight.  Shuffling destroys what neighbours say about each other and leaves all else alone, the
bias of a fit to finitely many vectors included; so the second step is memory (Lookabaugh & Gray 1989), and of the first
the part that lattices of this dimension have is space filling, the rest shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float as F32
from torch import Generator, Tensor

from bitbook.errors import WeightError
from bitbook.quantizer import FitOptions, checked, quantize
from bitbook.rate.memoryless import frequencies, quantize_memoryless
from bitbook.scalar.ecsq import ECSQ
from bitbook.scalar.leaves import Float
from bitbook.scalar.uniform import Uniform
from bitbook.theory.highrate import decibels, space_filling
from bitbook.theory.shannon import distortion_rate
from bitbook.theory.sources import Measured
from bitbook.vector.codebook import Codebook
from bitbook.vector.kmeans import kmeans

PRECISIONS = (4, 5, 6, 8)
"""Bits of a codeword's coordinate that are compared."""

_MOST_WEIGHTS = 200_000  # of a tensor that are looked at
LEAST_WEIGHTS = 1_000
"""A tensor of fewer does not show its distribution."""
_VECTORS_PER_CODEWORD = 32
_MOST_CODEWORDS = 512
_NEIGHBOUR = 3  # the k of the k-nearest-neighbour entropy
_NEIGHBOUR_VECTORS = 6_000
_FIT = FitOptions(iterations=30)
_ECSQ = ECSQ(8, points=Float())
_PRICE = math.log(2) / 6  # of a bit in squared steps, at high rate


@dataclass(frozen=True)
class Book:
    """A codebook at fixed width: what it costs, and what it loses."""

    dimension: int
    codewords: int
    precision: int
    """Bits of each coordinate of a codeword."""
    per_weight: float
    """Bits per weight: codes, and all weights' share of the codewords."""
    mse: float
    """In units of the variance, measured."""
    predicted: float | None
    """The same as a model has it: the error with exact codewords, plus step² / 12 of their rounding."""

    @property
    def merit(self) -> float:
        """Decibels of error at equal bytes, at 6.02 dB for a bit; less is better."""
        return decibels(self.mse) + 20 * math.log10(2) * self.per_weight


@dataclass(frozen=True)
class Gains:
    """Everything in dB of squared error at `bits` bits per weight, over the best fixed-rate scalar quantizer."""

    name: str
    weights: int
    bits: float
    dimension: int
    codewords: int
    scalar: float
    """Mean squared error of the scalar quantizer, in units of the variance; so are `vector`, `ecsq` and `bound`."""
    vector: float
    ecsq: float
    bound: float
    memory: float
    shape: float
    space_filling: float
    memory_gauss: float
    """What memory would be at high rate, were weights jointly normal: from their correlations alone."""
    memory_neighbours: float
    """The same from the entropy of vectors by nearest neighbours, which sees any dependence."""
    precisions: tuple[Book, ...]
    """The same codebook with coarser and finer codewords."""
    sizes: tuple[Book, ...]
    """Codebooks of about the same rate, for vectors of other lengths, with 8-bit codewords."""

    @property
    def vectors(self) -> float:
        """All that vectors gain."""
        return decibels(self.scalar / self.vector)

    @property
    def vectors_net(self) -> float:
        """What the best codebook gains once its own bytes count, at 6.02 dB a bit."""
        plain = decibels(self.scalar) + 20 * math.log10(2) * self.bits
        return plain - min(book.merit for book in (*self.sizes, *self.precisions) if book.dimension > 1)

    @property
    def entropy_coding(self) -> float:
        return decibels(self.scalar / self.ecsq)

    @property
    def above_bound(self) -> float:
        """From the entropy-coded scalar to the bound of a code that sees no neighbours."""
        return decibels(self.ecsq / self.bound)

    @property
    def best_precision(self) -> Book:
        return min(self.precisions, key=lambda book: book.merit)

    @property
    def best_size(self) -> Book:
        return min(self.sizes, key=lambda book: book.merit)

    @property
    def bars(self) -> dict[str, dict[str, float]]:
        """For a picture: what each way of coding gains, part by part."""
        return {
            f"vectors of {self.dimension}, fixed rate": {
                "space filling": self.space_filling, "shape": self.shape, "memory": self.memory,
            },
            "scalars, entropy-coded": {"entropy coding": self.entropy_coding},
            "bound without neighbours": {"entropy coding": self.entropy_coding, "left to the bound": self.above_bound},
            "bound with memory": {
                "entropy coding": self.entropy_coding, "left to the bound": self.above_bound,
                "memory": max(self.memory, 0.0),
            },
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with what follows from the fields."""
        derived = {
            "vectors": self.vectors,
            "vectors_net": self.vectors_net,
            "entropy_coding": self.entropy_coding,
            "above_bound": self.above_bound,
        }
        best = {"best_precision": self.best_precision.precision, "best_codewords": self.best_size.codewords}
        return {**asdict(self), **derived, **best, "advice": self.advice()}

    def advice(self) -> list[str]:
        """What the numbers recommend, in sentences that name them."""
        best = self.best_precision
        net = self.vectors_net
        if self.entropy_coding >= net:
            first = f"Entropy-code scalars: that gains {self.entropy_coding:.2f} dB over fixed-rate scalars"
        else:
            first = f"Use vectors: they gain {net:.2f} dB over fixed-rate scalars at equal bytes"
        other = (
            f"vectors gain {net:.2f} dB at equal bytes, and {self.vectors:.2f} dB if their codewords were free"
            if self.entropy_coding >= net
            else f"entropy coding of scalars {self.entropy_coding:.2f} dB"
        )
        first = f"{first}; {other}."
        worth = f"{self.memory:.2f} dB at this rate, {self.memory_neighbours:.2f} dB at high rates by their entropies"
        second = (
            f"Neighbours depend on each other ({worth}): use vectors, or a coder with contexts."
            if self.memory > 0.3
            else f"Neighbours say little about each other ({worth}): contexts would gain little."
        )
        third = (
            f"Entropy-coded scalars end {self.above_bound:.2f} dB above the bound of codes without contexts; at most "
            f"1.53 dB of it is what cells of many dimensions, a trellis or a lattice, can fill at high rate."
        )
        size = self.best_size
        fourth = (
            f"For {self.weights:,} weights, a codebook pays best with {size.codewords} codewords of {size.dimension}, "
            f"its own bytes counted; {self.codewords} of {self.dimension} are best stored in {best.precision} bits a "
            f"coordinate."
        )
        return [first, second, third, fourth]


def explain(name: str, w: Tensor, bits: float = 2.0, *, seed: int = 0) -> Gains:
    """Measure the gains of a tensor at about `bits` bits per weight.

    Vectors lie along rows, of the most weights, 8, 4 or 2, for which a codebook at that rate has enough to learn from,
    32 vectors for each codeword; the rate is then that of a power of two of codewords.  Large tensors are represented
    by their first rows, odd rows without their last weight.

    Raises `WeightError` for fewer than 1,000 weights, and for weights that are all equal.
    """
    w = checked(w)
    count = w.numel()
    if count < LEAST_WEIGHTS:
        raise WeightError(f"{name} has {count} weights; its distribution shows from {LEAST_WEIGHTS:,} on")
    matrix = w.reshape(len(w), -1) if w.dim() > 1 else w.reshape(1, -1)
    if matrix.shape[1] % 2:
        matrix = matrix[:, :-1] if matrix.shape[1] > 1 else matrix.reshape(1, -1)[:, : count // 2 * 2]
    kept = max(_MOST_WEIGHTS // matrix.shape[1], 1)
    matrix = matrix[:kept, : _MOST_WEIGHTS // 8 * 8]
    variance = float(matrix.double().var(correction=0))
    if variance <= 0:
        raise WeightError(f"the weights of {name} are all equal")
    matrix = (matrix - matrix.mean()) / math.sqrt(variance)

    lengths = _lengths(matrix, bits)
    d = lengths[-1]
    codewords = 2 ** max(round(bits * d), 1)
    bits = math.log2(codewords) / d
    generator = Generator().manual_seed(seed)
    shuffled = matrix.reshape(-1)[torch.randperm(matrix.numel(), generator=generator)].reshape(matrix.shape)
    vectors, mixed = _vectors(matrix, d), _vectors(shuffled, d)

    scalar = _scalar(matrix, bits)
    vector = _least(vectors, codewords, generator)
    independent = _least(mixed, codewords, generator)
    rest = decibels(scalar / independent)
    filling = min(space_filling(d), max(rest, 0.0))
    ecsq = _entropy_coded(matrix, bits)
    bound = distortion_rate(Measured(name, matrix), bits + 0.1)(bits)
    precisions = tuple(_book(matrix, d, codewords, b, vector, count) for b in PRECISIONS)
    sizes = tuple(_book(matrix, k, 2 ** max(round(bits * k), 1), 8, None, count) for k in lengths[:-1])
    return Gains(
        name, count, bits, d, codewords, scalar, vector, ecsq, bound, decibels(independent / vector), rest - filling,
        filling, gaussian_memory(vectors) - gaussian_memory(mixed),
        neighbour_memory(vectors, mixed, generator), precisions, (*sizes, precisions[-1]),
    )  # fmt: skip


def gaussian_memory(vectors: F32[Tensor, "n d"]) -> float:
    """Decibels by which coding normal vectors together beats coding their numbers alone: `σ² / det(Σ)^(1/d)`.

    σ² is the variance over all places of a vector, as a scalar quantizer sees it.
    """
    centred = vectors.double() - vectors.double().mean()
    covariance = centred.T @ centred / len(centred)
    d = covariance.shape[0]
    sign, log_det = torch.linalg.slogdet(covariance)
    if sign <= 0:
        return math.inf
    return 10 / math.log(10) * float(covariance.trace().div(d).log() - log_det / d)


def neighbour_memory(
    vectors: F32[Tensor, "n d"], shuffled: F32[Tensor, "n d"], generator: Generator | None = None
) -> float:
    """Decibels from the entropies of vectors and of shuffled ones, by distances to the third neighbour.

    The estimate of Kozachenko & Leonenko (1987); constants and most of the bias are the same in both.
    """
    d = vectors.shape[1]
    nats = (_log_distance(shuffled, generator) - _log_distance(vectors, generator)) / d
    return 20 / math.log(10) * nats


def _log_distance(vectors: Tensor, generator: Generator | None) -> float:
    """Number of coordinates times the mean logarithm of the distance to the third neighbour, of some of the vectors."""
    if len(vectors) > _NEIGHBOUR_VECTORS:
        vectors = vectors[torch.randperm(len(vectors), generator=generator)[:_NEIGHBOUR_VECTORS]]
    k = min(_NEIGHBOUR, len(vectors) - 1)
    logs = []
    for i in range(0, len(vectors), 1000):
        distance = torch.cdist(vectors[i : i + 1000].double(), vectors.double())
        nearest = distance.topk(k + 1, largest=False).values[:, -1]  # the first is the vector itself
        logs.append(nearest.clamp_min(1e-12).log())
    return vectors.shape[1] * float(torch.cat(logs).mean())


def _lengths(matrix: Tensor, bits: float) -> list[int]:
    """The lengths of vectors, ascending, whose codebook at this rate has enough vectors to learn from."""
    found = [
        d
        for d in (1, 2, 4, 8)
        if matrix.shape[1] % d == 0
        and 2 ** round(bits * d) <= min(matrix.numel() // (d * _VECTORS_PER_CODEWORD), _MOST_CODEWORDS)
    ]
    return found if len(found) > 1 else [1, 2]


def _least(vectors: F32[Tensor, "n d"], codewords: int, generator: Generator) -> float:
    """Mean squared error per number of k-means that ran until little moved."""
    found = kmeans(vectors, codewords, iterations=200, tolerance=1e-7, generator=generator)
    return found.inertia / vectors.numel()


def _vectors(matrix: Tensor, d: int) -> Tensor:
    return matrix.reshape(-1, d)


def _scalar(matrix: Tensor, bits: float) -> float:
    """The best scalar quantizer's error at a rate: between two numbers of levels on a straight line in dB."""

    def error(levels: int) -> float:
        points = matrix.reshape(-1, 1)
        return _least(points, levels, Generator().manual_seed(0))

    exact = 2**bits
    low = math.floor(exact + 1e-9)
    if abs(exact - low) < 1e-6:
        return error(low)
    share = (bits - math.log2(low)) / math.log2((low + 1) / low)
    return error(low) ** (1 - share) * error(low + 1) ** share


def _entropy_coded(matrix: Tensor, bits: float) -> float:
    """ECSQ's error at this entropy per weight, between two steps close to it on a straight line in dB."""

    def run(log_step: float) -> tuple[float, float]:
        step = 2**log_step
        options = FitOptions(step=step, iterations=0)
        found = quantize_memoryless(_ECSQ, matrix, _PRICE * step * step, options=options)
        (spec,) = found.recipe.layout(found.shape)
        rate = frequencies(spec, found.codes[spec.name]).bits / matrix.numel()
        return rate, float((found.decode() - matrix).double().square().mean())

    return _at_rate(run, 1.8 - bits, bits)


def _at_rate(run: Callable[[float], tuple[float, float]], x: float, bits: float) -> float:
    """The error at a rate, after a few steps of one bit for each doubling of the parameter."""
    rate, error = run(x)
    for _ in range(6):
        if abs(rate - bits) < 0.01:
            break
        x += max(min(rate - bits, 1.5), -1.5)
        rate, error = run(x)
    return error * 4 ** (rate - bits)


def _book(matrix: Tensor, d: int, codewords: int, precision: int, exact: float | None, count: int) -> Book:
    """Measure a codebook with rounded codewords; its bytes are shared by all `count` weights."""
    recipe = Codebook(codewords, (1, d), centroids=Uniform(precision))
    found = quantize(recipe, matrix, options=_FIT, generator=Generator().manual_seed(0))
    stored = found.side["centroids"]
    size, step = stored.shape[0], float(stored.side["scale"].decode())
    per_weight = math.log2(size) / d + (size * d * precision + 32) / count
    error = float((found.decode() - matrix).double().square().mean())
    return Book(d, size, precision, per_weight, error, None if exact is None else exact + step**2 / 12)
