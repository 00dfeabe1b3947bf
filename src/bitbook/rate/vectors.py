"""The price of codewords in training: entropy-constrained vector quantization of blocks whose latents live on.

    blocks of the latent ─┬─ in every step ─► codes: least squared error + λ' · bits (Chou, Lookabaugh & Gray 1989)
                          └─ in turns ──────► pull: d expected bits / d block, its code softly chosen

A codeword that few blocks use costs each of them more, in its code and as a share of its own bytes in the file, so
that codewords die; the file leaves the dead ones out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitbook.blocks import Grid
from bitbook.qat import FakeQuantize
from bitbook.quantizer import StreamSpec
from bitbook.rate.rates import fit_place_rates, fit_rates
from bitbook.slot import slots
from bitbook.vector.cheapest import cheapest
from bitbook.vector.codebook import Codebook

_TURNS = 16  # steps in which every block's pull is found anew once; codes that wait so long let trainings diverge
_SHARE = 0.2  # λ', as a share of the squared error that a bit saves a codebook of high rate; 1 empties it at once
_CHUNK = 1 << 20  # distances that are held at once
_LEAST_ERROR = 1e-12  # mean squared error of a block below which codes are as good as exact


class Book(NamedTuple):
    """The codewords in use with what they cost, frozen until the next count."""

    codewords: Float[Tensor, "used size"]
    symbols: Int[Tensor, " used"]
    """The codeword's row in the codebook."""
    idle: int
    """Which of them is the most frequent."""
    bits: Float[Tensor, " used"]
    """Of a codeword, given that the block is not idle; 0 for the idle one."""
    working: Float[Tensor, " blocks"]
    """Bits of saying that a block is not idle, more than of saying that it is: as a scalar that is not zero."""
    temperature: float
    """T, the mean squared error of a block."""


def soft_pull(book: Book, blocks: Float[Tensor, "n size"], rows: slice) -> Float[Tensor, "n size"]:
    """Of the blocks in `rows`: d expected bits / d block.

    `p(k) ∝ exp(-|w - c(k)|² / T) · 2^-b(k)`, the soft code of Agustsson et al. (2017) with the bits as a prior, and
    `d E[b] / dw = 2 / T · Cov(b, c)`.
    """
    codewords, idle = book.codewords, book.idle
    distance = codewords.square().sum(1) - 2 * blocks @ codewords.T
    logits = distance / -book.temperature - math.log(2) * book.bits
    logits[:, idle] += math.log(2) * book.working[rows]
    p = logits.softmax(1)
    moments = p @ torch.cat([book.bits[:, None], book.bits[:, None] * codewords, codewords], 1)
    bits, weighed, mean = moments.split([1, codewords.shape[1], codewords.shape[1]], 1)
    # Cov is blind to bits that all codewords cost: only the idle one's difference is left of the place's.
    less = -book.working[rows][:, None] * p[:, idle : idle + 1]
    covariance = weighed + less * codewords[idle] - (bits + less) * mean
    return covariance * (2 / book.temperature)


class PricedCodebook:
    """One codebook in training: its codes, assigned under the price, and the price's pull on its latent.

    Args:
        source: of a `Codebook` with a latent weight; its codes are assigned here from now on.
    """

    def __init__(self, source: FakeQuantize) -> None:
        self.source, self.recipe = source, cast(Codebook, source.recipe)
        self.grid = Grid.of(source.shape, self.recipe.block, pad=self.recipe.pad)
        (self.spec,) = self.recipe.layout(source.shape)
        with torch.no_grad():
            source.assign_(self.recipe.encode(self.latent.float(), {"centroids": self._codewords()}))
        self._size = len(self._codewords())
        self._pull = torch.zeros(self.grid.R * self.grid.C, self.grid.r * self.grid.c)
        self._turn = 0
        self.count()

    @property
    def latent(self) -> Tensor:
        """The float weight."""
        return cast(Tensor, self.source.latent)

    @property
    def bits(self) -> float:
        """Of all codes and the codewords in use: at the last count, and what changed since as each change alone."""
        return self._counted + self._cost()

    @torch.no_grad()
    def count(self) -> None:
        """Count the codes anew; codewords that no block uses are given up for good."""
        codes = self.source.codes["codes"]
        counts = torch.bincount(codes.flatten().long(), minlength=self._size).double()
        blocks = self.grid.split(self.latent.float())
        if not self.source.rounding:
            self._move_to_means(codes.flatten().long(), blocks, counts)
        codewords = self._codewords()
        symbols = counts.nonzero().squeeze(1)
        most = int(counts.argmax())
        self._give_up(counts == 0, most)
        counts = counts[symbols]
        idle = int((symbols == most).nonzero())
        busy = (codes != most).int()
        rates = fit_place_rates(StreamSpec("busy", self.spec.grid, None), busy)
        working = counts.sum() - counts[idle]
        bits = -torch.log2(counts / working.clamp_min(1)) + self._stored_bits() / counts
        bits[idle] = 0
        error = (blocks - codewords[codes.flatten().long()]).square().sum(1).mean()
        self.book = Book(
            codewords[symbols],
            symbols,
            idle,
            bits.float(),
            (rates(torch.ones_like(busy)) - 1).clamp_min(0).flatten(),  # without the bit of a sign
            max(float(error), _LEAST_ERROR),
        )
        self._counted = rates.bits - float(working) + float((counts * bits).sum()) - self._cost()

    @torch.no_grad()
    def add(self, lam: float) -> None:
        """Add λ · pull to the latent's gradient, after some blocks had their turn of a new pull."""
        blocks = self.grid.split(self.latent.float())
        book = self.book
        per_turn = math.ceil(len(blocks) / _TURNS)
        first = self._turn % _TURNS * per_turn
        self._turn += 1
        for start in range(first, min(first + per_turn, len(blocks)), chunk := max(_CHUNK // len(book.symbols), 1)):
            rows = slice(start, min(start + chunk, first + per_turn))
            self._pull[rows] = soft_pull(book, blocks[rows], rows)
        if self.latent.grad is None:
            self.latent.grad = torch.zeros_like(self.latent)
        self.latent.grad.add_(self.grid.join(self._pull, tuple(self.latent.shape)), alpha=lam)

    @torch.no_grad()
    def assign(self, lam: float) -> None:
        """Choose every code anew; without a price the nearest."""
        slope = 2 * math.log(2) * self.book.temperature / self._pull.shape[1]  # of squared error against bits
        self.encode_(_SHARE * slope if lam > 0 else 0.0)

    @torch.no_grad()
    def encode_(self, weight: float) -> None:
        """Choose every code by squared error plus `weight` · bits, at the last count."""
        book = self.book = self.book._replace(codewords=self._codewords()[self.book.symbols])
        labels = cheapest(
            self.grid.split(self.latent.float()),
            book.codewords,
            weight * book.bits,
            book.idle,
            -weight * book.working,
        )
        codes = self.source.codes["codes"]
        codes.copy_(book.symbols[labels].reshape(codes.shape))

    def _cost(self) -> float:
        """Bits that the codes as they are cost more than idle blocks everywhere, each by itself."""
        place = torch.zeros(self._size, dtype=torch.long)
        place[self.book.symbols] = torch.arange(len(self.book.symbols))
        codes = place[self.source.codes["codes"].flatten().long()]
        return float((self.book.bits[codes] + self.book.working * (codes != self.book.idle)).sum())

    def _codewords(self) -> Float[Tensor, "size d"]:
        return self.source.side_values()["centroids"]

    def _move_to_means(self, labels: Tensor, blocks: Tensor, counts: Tensor) -> None:
        """Lloyd's step: while blocks are not rounded, no gradient reaches the codewords."""
        child = cast(FakeQuantize, self.source.side.centroids)
        means = torch.zeros(self._size, blocks.shape[1]).index_add_(0, labels, blocks)
        means /= counts.clamp_min(1).float()[:, None]
        if child.latent is not None:
            child.latent[counts > 0] = means[counts > 0]

    def _give_up(self, dead: Tensor, most: int) -> None:
        """Let dead codewords be the most frequent one, so that no block and no shared scale sees them again."""
        child = cast(FakeQuantize, self.source.side.centroids)
        if child.latent is not None and bool(dead.any()):
            child.latent[dead] = child.latent[most].clone()

    def _stored_bits(self) -> float:
        """Bits of a codeword in the file."""
        total = 0.0
        for spec, codes in cast(FakeQuantize, self.source.side.centroids).freeze().streams():
            if spec.alphabet is None:
                total += fit_rates(spec, codes).bits
            else:
                total += codes.numel() * math.log2(spec.alphabet)
        return total / self._size


def priced_codebooks(model: nn.Module) -> Iterator[FakeQuantize]:
    """Every source with a codebook and a latent weight, tied ones once."""
    found: dict[int, FakeQuantize] = {}
    for module in model.modules():
        for source in slots(module).values():
            if isinstance(source, FakeQuantize) and isinstance(source.recipe, Codebook) and source.latent is not None:
                found[id(source)] = source
    yield from found.values()
