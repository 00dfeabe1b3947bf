"""Hidden units that are all zero: train a narrow network, deploy it in a wide one."""

from __future__ import annotations

import torch
from torch import nn

from bitbook.errors import PlanError
from bitbook.qat import FakeQuantize


@torch.no_grad()
def widen(narrow: nn.Module, wide: nn.Module) -> None:
    """Let `wide` compute what `narrow` does: its first units are those of `narrow`, everything else is zero.

    The two have the same tensors by name, those of `wide` with more units; the units of one layer are the first axis of
    its weight and, channels before places where they are flattened, the second axis of the next.  Where weights are
    quantized, both are so by the same plan, with side tensors that all weights share: zeros are codes 0, and an
    adaptive coder writes a hundred thousand of them in a few bytes.

    Layers that divide their inputs into groups or normalise over their units would not compute the same.

    Raises `PlanError` where the two do not fit; `wide` then stays as it was.
    """
    small, large = narrow.state_dict(), wide.state_dict()
    if small.keys() != large.keys():
        names = ", ".join(sorted(small.keys() ^ large.keys()))
        raise PlanError(f"only one of the two networks has {names}; both must be quantized by the same plan")
    for model in (narrow, wide):
        for name, source in model.named_modules():
            if isinstance(source, FakeQuantize) and (source.latent is None or not source.shares_side_tensors):
                raise PlanError(f"{name}: only latent weights that share side tensors can be widened")
    for name, value in large.items():
        axes = zip(small[name].shape, value.shape, strict=False)
        if small[name].dim() != value.dim() or any(few > many for few, many in axes):
            raise PlanError(f"{name}: {tuple(small[name].shape)} does not fit into {tuple(value.shape)}")
    for name, value in large.items():
        value.zero_()[tuple(slice(length) for length in small[name].shape)] = small[name]
