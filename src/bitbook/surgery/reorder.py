"""The order of hidden units, which a network does not care about and a coder with contexts does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitbook.errors import PlanError
from bitbook.qat import FakeQuantize
from bitbook.slot import slots


@torch.no_grad()
def sort_units(layers: Sequence[nn.Linear | nn.Conv2d]) -> None:
    """Sort the hidden units between each two of `layers` by how many weights they have, the busiest first.

    A unit is an output of a `Linear` or a channel of a `Conv2d`; where channels are flattened, each owns as many
    neighbouring inputs of the next layer as it has places.  The layers follow each other with nothing between that
    treats units differently, as activation functions and pooling do not: the network computes what it did.
    Neighbours then have similar numbers of weights, which is what contexts are made of; it saves an adaptive coder two
    or three percent.

    Raises `PlanError` where two layers do not fit, or a weight has no latent of its own.
    """
    for before, after in pairwise(layers):
        inputs = _by_unit(after.weight, before, after)
        busy = before.weight.flatten(1).count_nonzero(1) + inputs.count_nonzero((0, 2))
        order = busy.argsort(descending=True, stable=True)
        for name in ("weight", "bias") if before.bias is not None else ("weight",):
            value = _values(before, name)
            value.copy_(value.index_select(0, order))
        value = _values(after, "weight")
        value.copy_(_by_unit(value, before, after).index_select(1, order).reshape(value.shape))


def _by_unit(weight: Tensor, before: nn.Module, after: nn.Module) -> Float[Tensor, "outputs units places"]:
    """The weight of `after` by the units of `before` that it takes."""
    assert isinstance(before, nn.Linear | nn.Conv2d)
    units = len(before.weight)
    inputs = weight.shape[1]
    flattened = isinstance(before, nn.Conv2d) and isinstance(after, nn.Linear)
    if inputs % units or (inputs != units and not flattened):
        raise PlanError(f"{before} gives {units} units, {after} takes {inputs}")
    return weight.reshape(len(weight), units, -1)


def _values(layer: nn.Module, name: str) -> Tensor:
    """What training moves: a parameter, or the latent of a source whose weights may change places."""
    source = slots(layer).get(name)
    if source is None:
        return getattr(layer, name)
    if not isinstance(source, FakeQuantize) or source.latent is None or not source.shares_side_tensors:
        raise PlanError(f"{type(layer).__name__}.{name}: only latent weights that share side tensors can be sorted")
    return source.latent
