"""Rate-aware encoding of one tensor: the least squared error plus λ · bits, codes and their statistics in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Generator, Tensor

from bitbook.quantizer import FitOptions, Price, Quantized, Quantizer, checked, quantize, quantize_side, unbounded
from bitbook.rate.rates import fit_rates

if TYPE_CHECKING:
    from bitbook.feedback.error_feedback import ErrorFeedback


def quantize_priced(
    recipe: Quantizer,
    w: Tensor,
    lam: float,
    *,
    encoder: ErrorFeedback | None = None,
    importance: Tensor | None = None,
    options: FitOptions = FitOptions(),
    generator: Generator | None = None,
    rounds: int = 6,
) -> Quantized:
    """Quantize a tensor so that importance-weighted squared error plus `lam` · bits is small.

    Codes are chosen under the rates of the codes before them, and counted anew: entropy-constrained scalar and vector
    quantization (Chou, Lookabaugh & Gray 1989).  After each pass, reconstruction points move to the means of what they
    stand for.  The best of `rounds` passes is kept, by the same sum.  With `encoder`, the error is that of the layer's
    outputs, and fed back from column to column.  Where codes have no bound, a step that `options` leave open follows
    from λ.  Raises as `quantize`, and `PlanError` where a recipe's codes leave no choice.
    """
    w = checked(w)
    if encoder is not None:
        return encoder.quantize_priced(
            recipe, w, lam, importance=importance, options=options, generator=generator, rounds=rounds
        )
    shape = tuple(w.shape)
    if lam and options.step is None and unbounded(recipe.resolve(shape), shape):
        average = 1.0 if importance is None else float(importance.double().mean())
        options = replace(options, step=recipe.step_for(lam / average))
    found = quantize(recipe, w, importance=importance, options=options, generator=generator)
    if not lam:
        return found

    def error(found: Quantized) -> float:
        error = (found.decode() - w).square()
        return float((error if importance is None else importance * error).sum())

    def encode(recipe: Quantizer, side: Mapping[str, Tensor], price: Price) -> dict[str, Tensor]:
        return recipe.encode_priced(w, side, price, importance=importance)

    def recentre(found: Quantized) -> Quantized:
        return recentred(found, w, importance, options)

    return settled(found, lam, rounds, error, encode, recentre)


def settled(
    found: Quantized,
    lam: float,
    rounds: int,
    error: Callable[[Quantized], float],
    encode: Callable[[Quantizer, Mapping[str, Tensor], Price], dict[str, Tensor]],
    recentre: Callable[[Quantized], Quantized] = lambda found: found,
) -> Quantized:
    """Count, suit the side tensors to the codes, and encode in turn; what has the least `error` plus `lam` · bits."""
    best, least = found, float("inf")
    for left in range(rounds, 0, -1):
        rates = {spec.name: fit_rates(spec, found.codes[spec.name]) for spec in found.recipe.layout(found.shape)}
        found = recentre(found)
        cost = error(found) + lam * sum(stream.bits for stream in rates.values())
        if cost < least:
            best, least = found, cost
        if left > 1:
            side = {name: stored.decode() for name, stored in found.side.items()}
            found = replace(found, codes=encode(found.recipe, side, Price(lam, rates)))
    return best


def recentred(found: Quantized, w: Tensor, importance: Tensor | None, options: FitOptions) -> Quantized:
    """The same with the side tensors that suit its codes best, stored as before."""
    before = {name: stored.decode() for name, stored in found.side.items()}
    moved = found.recipe.recentre(w, found.codes, before, importance=importance)
    side = {
        name: stored
        if moved[name] is before[name]
        else quantize_side(stored.recipe, moved[name], found.recipe.side_options(name, options))
        for name, stored in found.side.items()
    }
    return replace(found, side=side)
