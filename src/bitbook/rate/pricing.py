"""The price of bits as a part of the gradient: two calls in a training loop of one's own.

    loss.backward()
    pricing.add()        # λ · d bits / d weight joins the gradients
    optimizer.step()
    pricing.step()       # schedules; now and then the rates are counted anew

Between two neighbouring levels of a weight, bits are taken to grow linearly, so the price pulls every weight towards
zero, hardest where its row, its column and its surroundings are empty: whole rows and columns die by themselves, and
what survives lies together, where a coder with contexts needs the fewest bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitbook.blocks import WHOLE, Grid
from bitbook.errors import PlanError
from bitbook.qat import FakeQuantize
from bitbook.quantizer import Price
from bitbook.rate.rates import Rates, fit_place_rates
from bitbook.rate.vectors import PricedCodebook, priced_codebooks
from bitbook.scalar import ladder
from bitbook.slot import slots
from bitbook.vector.codebook import Codebook

_FLOOR = 0.5
"""Share of its first value below which a first level does not fall: the closer it is to zero, the more weights reach it
and pull it further, until nothing is zero any more."""
_LEAST_DISTANCE = 1e-6  # between two points that fell together: no price is steeper


@dataclass(frozen=True, eq=False)
class _Priced:
    """One source with its rates, and the bits of a unit of weight: by place below the first rung, then by rung."""

    source: FakeQuantize
    rates: Rates
    grid: Grid
    rungs: Float[Tensor, "blocks magnitudes"]
    first: Float[Tensor, "blocks n"]
    above: Float[Tensor, "blocks magnitudes"]


class Pricing:
    """Adds the price of all weights of `model` that are levels in an order, or codewords, to their gradients.

    Args:
        model: quantized in place; weights keep their latents (`Regime(codes="latent")`, the scalars' habit), and their
            levels are fixed or learn.
        lam: λ, loss per bit.
        steps: of the whole training.
        ramp: share of the steps over which λ rises from zero.
        smooth: share of the steps, from the first, in which weights are priced but not rounded.
        refit: steps between two counts of the rates.

    Raises `PlanError` where nothing in the model can be priced.
    """

    def __init__(
        self, model: nn.Module, lam: float, *, steps: int, ramp: float = 0.1, smooth: float = 0.2, refit: int = 60
    ) -> None:
        self.lam, self.steps, self.ramp, self.smooth, self.refit = lam, steps, ramp, smooth, refit
        self.done = 0
        self._sources = list(_priced_sources(model))
        self._floors = [
            (parameter, _FLOOR * parameter.detach()[:, :1])
            for source in self._sources
            if (parameter := source.ladder_parameter()) is not None
        ]
        self._codebooks = [PricedCodebook(source) for source in priced_codebooks(model)]
        if not self._sources and not self._codebooks:
            raise PlanError(
                "no weight of the model is quantized so that a price could steer it; plan ECSQ(), a learned scale, or "
                "a Codebook under Regime(codes='latent')"
            )
        self._priced: list[_Priced] = []
        self._schedule()

    @property
    def bits(self) -> float:
        """Bits of all priced weights at the last count."""
        return sum(p.rates.bits for p in self._priced) + sum(codebook.bits for codebook in self._codebooks)

    @property
    def weights(self) -> int:
        """How many weights have a price."""
        sources = (*self._sources, *(codebook.source for codebook in self._codebooks))
        return sum(math.prod(source.shape) for source in sources)

    @torch.no_grad()
    def add(self) -> None:
        """Add the price's gradient to those of the latent weights; call it between `backward` and the optimizer."""
        lam = self._lam()
        for priced in self._priced:
            latent = cast(Tensor, priced.source.latent)
            if latent.grad is None:
                latent.grad = torch.zeros_like(latent)
            _add_price(latent, latent.grad, priced, lam)
        for codebook in self._codebooks:
            codebook.add(lam)

    def step(self) -> None:
        """Advance the schedule, and keep what the optimizer has moved in its bounds; call it after the optimizer."""
        with torch.no_grad():
            for points, floor in self._floors:
                torch.maximum(points[:, :1], floor, out=points[:, :1])
        self.done += 1
        if self._rounds() or self.done % self.refit == 0:  # before, codes serve for nothing but counting
            for codebook in self._codebooks:
                codebook.assign(self._lam())
        self._schedule()

    def finish(self) -> None:
        """Let every weight be rounded from now on, as in the file."""
        for source in (*self._sources, *(codebook.source for codebook in self._codebooks)):
            source.rounding = True

    def price(self, source: FakeQuantize) -> Price:
        """λ and the last count of one source, for an encoder."""
        rates = next(p.rates for p in self._priced if p.source is source)
        return Price(self.lam, {rates.spec.name: rates})

    def latents(self) -> list[Tensor]:
        """Copies of what `encode_` moves."""
        return [cast(Tensor, priced.source.latent).detach().clone() for priced in self._priced]

    @torch.no_grad()
    def encode_(self, weight: float, latents: Sequence[Tensor] | None = None) -> None:
        """Move every latent to the level that costs least: squared error plus `weight` · bits, at the last count.

        With `latents`, as they were at an earlier time, those are what errors are counted from.
        """
        for priced, latent in zip(self._priced, latents or self.latents(), strict=True):
            cast(Tensor, priced.source.latent).copy_(latent)
            frozen = priced.source.freeze(Price(weight, {priced.rates.spec.name: priced.rates}))
            cast(Tensor, priced.source.latent).copy_(frozen.decode())
        for codebook in self._codebooks:
            codebook.encode_(weight)

    def _rounds(self) -> bool:
        """Whether weights are rounded by now."""
        return self.done >= self.smooth * self.steps

    def _lam(self) -> float:
        """λ at this step."""
        rising = self.ramp * self.steps
        return self.lam * (min(1.0, self.done / rising) if rising else 1.0)

    @torch.no_grad()
    def _schedule(self) -> None:
        rounding = self._rounds()
        for source in (*self._sources, *(codebook.source for codebook in self._codebooks)):
            source.rounding = rounding
        if self.done % self.refit == 0:
            self._priced = [_count(source) for source in self._sources]
            for codebook in self._codebooks:
                codebook.count()


def _priced_sources(model: nn.Module) -> Iterator[FakeQuantize]:
    """Every source with latents and an order of magnitudes, tied ones once."""
    seen: set[int] = set()
    for module in model.modules():
        children = [child for source in slots(module).values() for child in (source, *_centroids(source))]
        for source in children:
            if isinstance(source, FakeQuantize) and source.latent is not None and id(source) not in seen:
                seen.add(id(source))
                one_stream = len(source.recipe.layout(source.shape)) == 1
                # Where scales follow the weights, smaller weights would be the same codes.
                if one_stream and not source.refreshes and source.ladder() is not None:
                    yield source


def _centroids(source: nn.Module) -> Iterator[nn.Module]:
    """How a codebook's codewords are stored."""
    if isinstance(source, FakeQuantize) and isinstance(source.recipe, Codebook):
        yield from source.side.children()


def _count(source: FakeQuantize) -> _Priced:
    rates = fit_place_rates(source.recipe.layout(source.shape)[0], source.freeze_codes())
    assert rates.nonzero is not None  # what has a ladder has an order
    rungs = cast(Tensor, source.ladder()).contiguous()
    distance = rungs.diff(dim=1)
    distance = torch.cat([distance, distance[:, -1:] if distance.shape[1] else rungs], 1).clamp_min(_LEAST_DISTANCE)
    grid = Grid.of(source.shape, getattr(source.recipe, "block", WHOLE), pad=getattr(source.recipe, "pad", False))
    first = grid.split(rates.nonzero + rates.table[0]).clamp_min(0) / rungs[:, :1].clamp_min(_LEAST_DISTANCE)
    return _Priced(source, rates, grid, rungs, first.contiguous(), rates.rises(rungs.shape[1]) / distance)


def _add_price(w: Tensor, grad: Tensor, priced: _Priced, lam: float) -> None:
    blocks = priced.grid.split(w)
    if ladder.serve(blocks) and grad.is_contiguous() and priced.grid.split(grad).data_ptr() == grad.data_ptr():
        ladder.add_price(blocks, priced.grid.split(grad), priced.rungs, priced.first, priced.above, lam)
        return
    slope, size = priced.first, blocks.abs()
    for i in range(priced.rungs.shape[1]):
        slope = torch.where(size >= priced.rungs[:, i : i + 1], priced.above[:, i : i + 1], slope)
    grad.add_(priced.grid.join(torch.sign(blocks) * slope, tuple(w.shape)), alpha=lam)
