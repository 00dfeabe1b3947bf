"""Rate-aware encoding of one tensor: the least squared error plus λ · bits, codes and their statistics in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Generator, Tensor

from bitbook.quantizer import FitOptions, Price, Quantized, Quantizer, checked, quantize
from bitbook.rate.rates import fit_rates

if TYPE_CHECKING:
    from bitbook.feedback import ErrorFeedback


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
    quantization (Chou, Lookabaugh & Gray 1989), with side tensors as they were fitted.  The best of `rounds` passes is
    kept, by the same sum.  With `encoder`, the error is that of the layer's outputs, and fed back between columns.
    Raises as `quantize`, and `PlanError` where a recipe's codes leave no choice.
    """
    if encoder is not None:
        return encoder.quantize_priced(
            recipe, checked(w), lam, importance=importance, options=options, generator=generator, rounds=rounds
        )
    found = quantize(recipe, w, importance=importance, options=options, generator=generator)

    def error(found: Quantized) -> float:
        error = (found.decode() - w.float()).square()
        return float((error if importance is None else importance * error).sum())

    def encode(recipe: Quantizer, side: Mapping[str, Tensor], price: Price) -> dict[str, Tensor]:
        return recipe.encode_priced(w.float(), side, price, importance=importance)

    return settled(found, lam, rounds, error, encode)


def settled(
    found: Quantized,
    lam: float,
    rounds: int,
    error: Callable[[Quantized], float],
    encode: Callable[[Quantizer, Mapping[str, Tensor], Price], dict[str, Tensor]],
) -> Quantized:
    """Encode and count in turn, and return what has the least `error` plus `lam` · bits."""
    side = {name: stored.decode() for name, stored in found.side.items()}
    (spec,) = found.recipe.layout(found.shape)
    best, least = found, float("inf")
    for _ in range(rounds):
        rates = fit_rates(spec, found.codes[spec.name])
        cost = error(found) + lam * rates.bits
        if cost < least:
            best, least = found, cost
        found = replace(found, codes=encode(found.recipe, side, Price(lam, {spec.name: rates})))
    return best
