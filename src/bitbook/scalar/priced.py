"""Choosing among neighbouring levels for the bits that they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bitbook.quantizer import Price, Quantizer


def cheapest(
    recipe: Quantizer,
    w: Tensor,
    side: Mapping[str, Tensor],
    candidates: Iterable[Tensor],
    price: Price,
    importance: Tensor | None,
) -> Tensor:
    """For each weight the candidate code with the least squared error plus λ · bits; the first of equals."""
    best, least = None, None
    for codes in candidates:
        error = (w - recipe.decode({"codes": codes}, side, tuple(w.shape))).square()
        error = error if importance is None else importance * error
        cost = error.reshape(codes.shape) + price.lam * price.bits["codes"](codes)
        if best is None or least is None:
            best, least = codes, cost
            continue
        best, least = torch.where(cost < least, codes, best), torch.minimum(cost, least)
    assert best is not None
    return best
