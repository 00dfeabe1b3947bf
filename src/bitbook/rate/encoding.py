"""Rate-aware encoding of one tensor: the least squared error plus λ · bits, codes and their statistics in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Generator, Tensor

from bitbook.quantizer import FitOptions, Price, Quantized, Quantizer, quantize, quantize_side
from bitbook.rate.rates import fit_rates


def quantize_priced(
    recipe: Quantizer,
    w: Tensor,
    lam: float,
    *,
    importance: Tensor | None = None,
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
    rounds: int = 6,
) -> Quantized:
    """Quantize a tensor so that importance-weighted squared error plus `lam` · bits is small.

    Codes are chosen under the rates of the codes before them, and counted anew: entropy-constrained scalar and vector
    quantization (Chou, Lookabaugh & Gray 1989).  After each pass, reconstruction points move to the means of what they
    stand for.  The best of `rounds` passes is kept, by the same sum.  Raises as `quantize`, and `PlanError` where
    a recipe's codes leave no choice.
    """
    found = quantize(recipe, w, importance=importance, options=options, generator=generator)
    if not lam:
        return found
    w = w.detach().float()
    (spec,) = found.recipe.layout(found.shape)
    best, least = found, float("inf")
    for _ in range(rounds):
        rates = fit_rates(spec, found.codes[spec.name])
        found = replace(found, side=_recentred(found, w, importance, options))
        error = (found.decode() - w).square()
        cost = float((error if importance is None else importance * error).sum()) + lam * rates.bits
        if cost < least:
            best, least = found, cost
        side = {name: stored.decode() for name, stored in found.side.items()}
        price = Price(lam, {spec.name: rates})
        found = replace(found, codes=found.recipe.encode_priced(w, side, price, importance=importance))
    return best


def _recentred(found: Quantized, w: Tensor, importance: Tensor | None, options: FitOptions) -> Mapping[str, Quantized]:
    """The side tensors that suit the codes best, stored as before."""
    before = {name: stored.decode() for name, stored in found.side.items()}
    moved = found.recipe.recentre(w, found.codes, before, importance=importance)
    return {
        name: stored
        if moved[name] is before[name]
        else quantize_side(stored.recipe, moved[name], found.recipe.child_options(options))
        for name, stored in found.side.items()
    }
