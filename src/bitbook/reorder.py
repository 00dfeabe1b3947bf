"""The order of hidden units, which a network does not care about and a coder with contexts does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bitbook.errors import PlanError
from bitbook.qat import FakeQuantize
from bitbook.slot import slots


@torch.no_grad()
def sort_units(layers: Sequence[nn.Linear]) -> None:
    """Sort the hidden units between each two of `layers` by how many weights they have, the busiest first.

    The layers follow each other with nothing between that treats units differently, as an activation function does
    not: the network computes what it did.  Neighbours then have similar numbers of weights, which is what contexts
    are made of; it saves an adaptive coder two or three percent.

    Raises `PlanError` where two layers do not fit, or a weight has no latent of its own.
    """
    for before, after in pairwise(layers):
        if before.out_features != after.in_features:
            raise PlanError(f"{before} gives {before.out_features} units, {after} takes {after.in_features}")
        busy = before.weight.count_nonzero(1) + after.weight.count_nonzero(0)
        order = busy.argsort(descending=True, stable=True)
        _permute(before, "weight", order, 0)
        _permute(after, "weight", order, 1)
        if before.bias is not None:
            _permute(before, "bias", order, 0)


def _permute(layer: nn.Linear, name: str, order: Tensor, axis: int) -> None:
    source = slots(layer).get(name)
    value = getattr(layer, name)
    if source is not None:
        if not isinstance(source, FakeQuantize) or source.latent is None or not source.shares_side_tensors:
            raise PlanError(f"{type(layer).__name__}.{name}: only latent weights that share side tensors can be sorted")
        value = source.latent
    value.copy_(value.index_select(axis, order))
